// /api/usage: one domain's month in numbers. All of them come from the public routes; nothing is kept.
import { ApiError, connect, end, readBatches, readJson } from "./session.js";

const TOP = 10;
const COLOURS = { answered: "#2166ac", missed: "#e08214", minutes: "#2a7f86", peak: "#6b4c9a", text: "#44505c", line: "#e3e8ee" };

const find = (id) => document.getElementById(id);
const choice = find("choice").elements;
const whole = new Intl.NumberFormat("en");
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const minutes = (seconds) => tenths.format(Math.round(seconds / 6) / 10); // halves are exact only so
// Days are dates without a zone: read and written as UTC, they stay what they are.
const asDate = (format, day) => new Intl.DateTimeFormat("en-GB", { ...format, timeZone: "UTC" }).format(new Date(`${day}T00:00Z`));
const monthName = (month) => asDate({ month: "long", year: "numeric" }, `${month}-01`);
const dayName = (day) => asDate({ day: "numeric", month: "long" }, day);
const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);
const highest = (rows, name) => rows.reduce((best, row) => (row[name] > best[name] ? row : best));

// Numbers ---------------------------------------------------------------------

function daysOf(month) {
  const [year, number] = month.split("-").map(Number);
  const count = new Date(Date.UTC(year, number, 0)).getUTCDate();
  return Array.from({ length: count }, (_, index) => `${month}-${String(index + 1).padStart(2, "0")}`);
}

/** A row for each day: calls, answered, missed, seconds, peak, and the interval of that peak. */
async function readDays(range, days, signal) {
  const [totals, peaks] = await Promise.all([
    readJson("call_totals", { ...range, group_by: "day" }, signal),
    readJson("concurrent_calls_by_domain", { ...range, resolution: "60" }, signal),
  ]);
  const rows = new Map(days.map((day) => [day, { day, calls: 0, answered: 0, missed: 0, seconds: 0, peak: 0, when: "" }]));
  for (const { day, calls, answered, billsec } of totals) {
    Object.assign(rows.get(day), { calls, answered, missed: calls - answered, seconds: billsec });
  }
  for (const { start_interval: start, end_interval: stop, active_calls: peak } of peaks) {
    const row = rows.get(start.slice(0, 10));
    if (peak > row.peak) Object.assign(row, { peak, when: `${start.slice(11, 16)} to ${stop.slice(11, 16)}` });
  }
  return [...rows.values()];
}

/** What outbound calls went to, most seconds first; progress is told how many calls were read. */
async function readDestinations(range, progress, signal) {
  const found = new Map();
  let read = 0;
  const parameters = { ...range, direction: "outbound", fields: "destination_number,billsec" };
  for await (const batch of readBatches("call_range", parameters, signal)) {
    for (const { destination_number: number, billsec } of batch) {
      const row = found.get(number) ?? { number, calls: 0, seconds: 0 };
      found.set(number, row);
      row.calls += 1;
      row.seconds += billsec;
    }
    progress((read += batch.length));
  }
  return [...found.values()].sort((a, b) => b.seconds - a.seconds || b.calls - a.calls || (a.number < b.number ? -1 : 1));
}

// Plots -----------------------------------------------------------------------

Object.assign(Chart.defaults, { animation: false, maintainAspectRatio: false, color: COLOURS.text, borderColor: COLOURS.line });
Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;

function makePlot(id, series, options = {}) {
  const datasets = series.map(([label, colour]) => ({ label, data: [], backgroundColor: colour, borderRadius: 2, maxBarThickness: 26 }));
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
        y: { stacked: true, beginAtZero: true, border: { display: false }, ticks: { maxTicksLimit: 6, ...options } },
      },
    },
  });
}

const plots = {
  calls: makePlot("calls-plot", [["Answered", COLOURS.answered], ["Missed", COLOURS.missed]], { precision: 0 }),
  minutes: makePlot("minutes-plot", [["Minutes", COLOURS.minutes]]),
  peak: makePlot("peak-plot", [["Calls at once", COLOURS.peak]], { precision: 0 }),
};

/** Draws columns of the rows and says in words, for who cannot see it, what there is to see. */
function draw(plot, rows, words, ...columns) {
  plot.days = rows.map((row) => row.day);
  plot.data.labels = rows.map((row) => Number(row.day.slice(8)));
  columns.forEach((column, index) => (plot.data.datasets[index].data = rows.map(column)));
  plot.canvas.setAttribute("aria-label", `${words} Every day's number is in the table Day by day.`);
  plot.update();
}

// A canvas does not follow the paper by itself.
addEventListener("beforeprint", () => Object.values(plots).forEach((plot) => (plot === plots.calls ? plot.resize(680, 150) : plot.resize(330, 125))));
addEventListener("afterprint", () => Object.values(plots).forEach((plot) => plot.resize()));

// The page --------------------------------------------------------------------

function fillRow(row, [head, ...cells]) {
  row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: head }));
  for (const text of cells) row.insertCell().textContent = text;
  return row;
}

function fillTable(part, rows) {
  part.replaceChildren();
  return rows.map((cells) => fillRow(part.insertRow(), cells));
}

const cellsOf = ({ calls, answered, missed, seconds, peak }) => [
  ...[calls, answered, missed].map((number) => whole.format(number)), minutes(seconds), whole.format(peak),
];

function showDays(rows) {
  const total = { ...highest(rows, "peak") };
  for (const name of ["calls", "answered", "missed", "seconds"]) total[name] = sum(rows, name);
  const share = (part) => (total.calls ? `${percent.format(part / total.calls)} of the calls` : "");
  const texts = {
    calls: whole.format(total.calls), minutes: minutes(total.seconds), peak: whole.format(total.peak),
    answered: whole.format(total.answered), "answered-share": share(total.answered),
    missed: whole.format(total.missed), "missed-share": share(total.missed),
    "peak-when": total.peak ? `on ${dayName(total.day)}, ${total.when}` : "",
  };
  for (const [id, text] of Object.entries(texts)) find(id).textContent = text;
  fillTable(find("days").tBodies[0], rows.map((row) => [asDate({ weekday: "short", day: "numeric" }, row.day), ...cellsOf(row)]));
  fillTable(find("days").tFoot, [["Month", ...cellsOf(total)]]);
  const busiest = highest(rows, "calls");
  const longest = highest(rows, "seconds");
  draw(plots.calls, rows, `${texts.answered} answered and ${texts.missed} missed calls; most on ${dayName(busiest.day)}: ${busiest.calls}.`,
    (row) => row.answered, (row) => row.missed);
  draw(plots.minutes, rows, `${texts.minutes} minutes; most on ${dayName(longest.day)}: ${minutes(longest.seconds)}.`, (row) => row.seconds / 60);
  draw(plots.peak, rows, `At most ${texts.peak} calls at once ${texts["peak-when"]}.`, (row) => row.peak);
  return total;
}

function showDestinations(found) {
  const top = found.slice(0, TOP);
  const rows = fillTable(find("destinations").tBodies[0],
    top.map(({ number, calls, seconds }) => [number ?? "none", whole.format(calls), minutes(seconds)]));
  top.forEach(({ seconds }, index) => rows[index].style.setProperty("--share", seconds / (top[0].seconds || 1)));
  find("destinations").hidden = !top.length;
  find("destinations-note").textContent = top.length
    ? `The ${whole.format(top.length)} of ${whole.format(found.length)} that outbound calls talked longest to.` : "No outbound calls.";
}

let current = new AbortController();

async function load() {
  current.abort();
  if (!find("choice").checkValidity()) return; // a year that is being typed
  const { signal } = (current = new AbortController());
  const { value: domain } = choice.domain, { value: month } = choice.month;
  const name = `${domain}, ${monthName(month)}`;
  const days = daysOf(month);
  const range = { domain_name: domain, from: days[0], to: days.at(-1), billable_only: String(choice.billable_only.checked) };
  find("problem").textContent = "";
  find("status").textContent = `Reading ${name} …`;
  find("report").setAttribute("aria-busy", "true");
  try {
    const rows = await readDays(range, days, signal);
    find("numbers").hidden = false; // before the plots, which have no size else
    find("destinations").hidden = true;
    find("destinations-note").textContent = "Reading calls …";
    const total = showDays(rows);
    find("title").textContent = `Usage of ${name}`;
    const found = await readDestinations(range, (read) => {
      find("destinations-note").textContent = `Reading calls … ${whole.format(read)}`;
    }, signal);
    showDestinations(found);
    find("status").textContent = total.calls ? `${name}: ${whole.format(total.calls)} calls.` : `${name}: no calls.`;
    find("report").setAttribute("aria-busy", "false");
  } catch (error) {
    if (!signal.aborted) fail(error);
  }
}

/** Takes the numbers off the page. */
function clear() {
  current.abort();
  find("numbers").hidden = true;
  find("title").textContent = "Usage";
  find("status").textContent = find("problem").textContent = "";
  find("report").setAttribute("aria-busy", "false");
  for (const part of [find("days").tBodies[0], find("days").tFoot, find("destinations").tBodies[0]]) part.replaceChildren();
}

function close() {
  clear();
  find("report").hidden = true;
}

function fail(error) {
  if (error instanceof ApiError && error.status === 401) {
    close();
    return end("Your session has ended: log in again.");
  }
  clear();
  find("problem").textContent = error instanceof ApiError ? error.message : `The answer broke off (${error.message}): try again.`;
}

function move(months) {
  const [year, number] = choice.month.value.split("-").map(Number);
  if (!year) return;
  choice.month.value = new Date(Date.UTC(year, number - 1 + months)).toISOString().slice(0, 7);
  load();
}

async function open() {
  const domains = await readJson("domains");
  const names = [...new Set(domains.map((domain) => domain.domain_name))];
  choice.domain.replaceChildren(...names.map((name) => new Option(name)));
  find("report").hidden = false;
  if (!names.length) {
    find("problem").textContent = "This account may read no domain yet: ask the operator for a grant.";
    return;
  }
  choice.domain.focus();
  await load();
}

const now = new Date();
choice.month.value = `${now.getFullYear()}-${String(now.getMonth() + 1).padStart(2, "0")}`;
find("choice").addEventListener("change", load);
find("choice").addEventListener("submit", (event) => event.preventDefault() ?? load());
find("previous").addEventListener("click", () => move(-1));
find("next").addEventListener("click", () => move(1));
find("print").addEventListener("click", () => print());
connect(open, close);
