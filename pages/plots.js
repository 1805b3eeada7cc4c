// The charts of a month. Their numbers are in its tables too.
import { dayName, locale } from "./format.js";

const LIGHT = {
  outbound: "#1f7a80", inbound: "#2166ac", local: "#8b97a5", other: "#b9a13c", answered: "#2166ac", missed: "#c96f0a", peak: "#6b4c9a",
  text: "#44505c", line: "#e3e8ee",
};
const DARK = {
  outbound: "#4fb3b9", inbound: "#6ea8e6", local: "#9aa6b4", other: "#d3bb55", answered: "#6ea8e6", missed: "#f0a24f", peak: "#b598e0",
  text: "#c3ccd6", line: "#37424f",
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const find = (id) => document.getElementById(id);

Object.assign(Chart.defaults, { animation: false, maintainAspectRatio: false, locale });
Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;

function makePlot(id, series, ticks = {}) {
  const datasets = series.map(([name, label]) => ({ name, label, data: [], borderRadius: 2, maxBarThickness: 26 }));
  // Without this WebKit prints a canvas black that is resized for the paper.
  find(id).getContext("2d", { willReadFrequently: true });
  return new Chart(find(id), {
    type: "bar",
    data: { labels: [], datasets },
    options: {
      interaction: { mode: "index", intersect: false },
      plugins: {
        legend: { display: series.length > 1, align: "end", labels: { boxWidth: 12, boxHeight: 12, padding: 12 } },
        tooltip: { callbacks: { title: ([item]) => dayName(item.chart.days[item.dataIndex]) } },
      },
      scales: {
        x: { stacked: true, grid: { display: false }, ticks: { maxRotation: 0, autoSkipPadding: 8 } },
        y: { stacked: true, beginAtZero: true, border: { display: false }, ticks: { maxTicksLimit: 6, ...ticks } },
      },
    },
  });
}

export const plots = {
  minutes: makePlot("minutes-plot", [["outbound", "Outbound"], ["inbound", "Inbound"], ["local", "Internal"], ["other", "Other"]]),
  calls: makePlot("calls-plot", [["answered", "Answered"], ["missed", "Not answered"]], { precision: 0 }),
  peak: makePlot("peak-plot", [["peak", "Calls at once"]], { precision: 0 }),
};

function paint(colours) {
  for (const plot of Object.values(plots)) {
    for (const dataset of plot.data.datasets) dataset.backgroundColor = colours[dataset.name];
    plot.options.color = plot.options.plugins.legend.labels.color = colours.text;
    for (const scale of Object.values(plot.options.scales)) {
      scale.ticks.color = colours.text;
      scale.grid.color = colours.line;
    }
    plot.update();
  }
}

const paintScreen = () => paint(dark.matches ? DARK : LIGHT);
dark.addEventListener("change", paintScreen);
paintScreen();

/** Draws the rows of days, series by series, and says in words, for who cannot see it, what there is to see. */
export function draw(plot, rows, words, valueOf) {
  plot.days = rows.map((row) => row.day);
  plot.data.labels = rows.map((row) => Number(row.day.slice(8)));
  for (const [index, dataset] of plot.data.datasets.entries()) {
    dataset.data = rows.map((row) => valueOf(row, dataset.name));
    plot.setDatasetVisibility(index, dataset.name !== "other" || dataset.data.some(Boolean));
  }
  plot.options.plugins.legend.labels.filter = ({ datasetIndex }) => plot.isDatasetVisible(datasetIndex);
  plot.canvas.setAttribute("aria-label", `${words} Every day's number is in the table Day by day.`);
  plot.update();
}

// A canvas follows neither the paper's size nor its colour by itself.
addEventListener("beforeprint", () => {
  paint(LIGHT);
  for (const plot of Object.values(plots)) plot.resize(360, 132);
});
addEventListener("afterprint", () => {
  paintScreen();
  for (const plot of Object.values(plots)) plot.resize();
});
