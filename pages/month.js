// One domain's month: its totals at once, then, from its calls, what sums cannot tell.
import { count, dayName, minutes, percent, timeOf, weekday, whole } from "./format.js";
import { saveTable } from "./files.js";
import { draw, plots } from "./plots.js";
import { ApiError, readBatches, readJson } from "./session.js";
import { fillHead, fillRows, sum } from "./table.js";

const TOP = 10;
export const DIRECTIONS = { outbound: "Outbound", inbound: "Inbound", local: "Local", other: "Other" };
const NAMES = Object.keys(DIRECTIONS);
const directionOf = (name) => (name in DIRECTIONS ? name : "other");
const find = (id) => document.getElementById(id);
const highest = (rows, name) => rows.reduce((best, row) => (row[name] > best[name] ? row : best));

// A call that was answered is billed the first so many seconds, then steps of so many. That is decided call by call, so
// it cannot be had from sums: half of all calls may end just after a step.
const STEPS = { "60/60": [60, 60], "30/6": [30, 6], "6/6": [6, 6], "1/1": [1, 1] };
const ROUNDINGS = Object.keys(STEPS);
const roundUp = (seconds, [first, next]) => (seconds > 0 ? first + Math.ceil(Math.max(0, seconds - first) / next) * next : 0);
const nothingRounded = () => Object.fromEntries(ROUNDINGS.map((name) => [name, 0]));

// Reading ---------------------------------------------------------------------

/** A row for each day: calls, answered, missed, seconds in all and by direction, peak, and the interval of that peak. */
export async function readDays(query, days, signal) {
  const [totals, peaks] = await Promise.all([
    readJson("call_totals", { ...query, group_by: "day,direction" }, signal),
    readJson("concurrent_calls_by_domain", { ...query, resolution: "60", active_only: "true" }, signal),
  ]);
  const empty = { calls: 0, answered: 0, missed: 0, seconds: 0, outbound: 0, inbound: 0, local: 0, other: 0, peak: 0, when: "" };
  const rows = new Map(days.map((day) => [day, { day, ...empty, byDirection: {} }]));
  for (const { day, direction, calls, answered, billsec } of totals) {
    const row = rows.get(day), name = directionOf(direction);
    const part = (row.byDirection[name] ??= { calls: 0, answered: 0 });
    for (const one of [row, part]) {
      one.calls += calls;
      one.answered += answered;
    }
    row.missed += calls - answered;
    row.seconds += billsec;
    row[name] += billsec;
  }
  for (const { start_interval: start, end_interval: stop, active_calls: peak } of peaks) {
    const row = rows.get(start.slice(0, 10));
    if (row && peak > row.peak) Object.assign(row, { peak, when: `${timeOf(start)} to ${timeOf(stop)}` });
  }
  return [...rows.values()];
}

/** What is told by the calls alone: roundings by direction, FusionPBX's missed calls, and where outbound calls went. */
export async function readCalls(query, signal, progress) {
  const found = { calls: 0, missed: 0, knowsMissed: false, rounded: Object.fromEntries(NAMES.map((name) => [name, nothingRounded()])) };
  const destinations = new Map();
  const fields = "direction,billsec,missed_call,destination_number";
  for await (const batch of readBatches("call_range", { ...query, fields }, signal)) {
    for (const { direction, billsec, missed_call: missed, destination_number: number } of batch) {
      found.missed += missed === true;
      found.knowsMissed ||= missed !== null;
      const sums = [found.rounded[directionOf(direction)]];
      if (direction === "outbound") {
        if (!destinations.has(number)) destinations.set(number, { number, calls: 0, seconds: 0, rounded: nothingRounded() });
        const row = destinations.get(number);
        row.calls += 1;
        row.seconds += billsec;
        sums.push(row.rounded);
      }
      for (const name of ROUNDINGS) for (const rounded of sums) rounded[name] += roundUp(billsec, STEPS[name]);
    }
    progress((found.calls += batch.length));
  }
  found.destinations = [...destinations.values()].sort((a, b) => b.seconds - a.seconds || b.calls - a.calls || (a.number < b.number ? -1 : 1));
  return found;
}

// Showing ---------------------------------------------------------------------

let rows = []; // the days that are shown
let domain = "";
let calls = null; // of readCalls, once they are there

/** Minutes by direction, and beside them rounded where that was asked for and the calls are there. */
function showDirections(rounding) {
  const parts = NAMES.map((name) => {
    const of = rows.map((row) => row.byDirection[name]).filter(Boolean);
    return { name, calls: sum(of, "calls"), answered: sum(of, "answered"), seconds: sum(rows, name), rounded: calls?.rounded[name][rounding] ?? 0 };
  }).filter((part) => part.calls);
  const total = sum(rows, "seconds");
  const columns = [
    ["Direction", (part) => DIRECTIONS[part.name], () => "All"],
    ["Calls", (part) => whole(part.calls), () => whole(sum(rows, "calls"))],
    ["Answered", (part) => whole(part.answered), () => whole(sum(rows, "answered"))],
    ["Not answered", (part) => whole(part.calls - part.answered), () => whole(sum(rows, "missed"))],
    ["Seconds", (part) => whole(part.seconds), () => whole(total)],
    ["Minutes", (part) => minutes(part.seconds), () => minutes(total)],
    ["Share", (part) => percent(part.seconds, total), () => percent(total, total)],
  ];
  if (rounding) {
    columns.push([`Minutes ${rounding}`, (part) => (calls ? minutes(part.rounded) : "…"), () => (calls ? minutes(sum(parts, "rounded")) : "…")]);
  }
  fillHead(find("directions"), columns.map(([head]) => ({ head })));
  fillRows(find("directions").tBodies[0], parts.map((part) => columns.map(([, text]) => text(part))));
  fillRows(find("directions").tFoot, [columns.map(([, , foot]) => foot())]);
  for (const name of ["outbound", "inbound", "local"]) {
    const part = parts.find((one) => one.name === name);
    find(name).textContent = minutes(part?.seconds ?? 0);
    find(`${name}-note`).textContent = part ? count(part.calls, "call") + (rounding && calls ? `; ${minutes(part.rounded)} at ${rounding}` : "") : "no calls";
  }
}

const dayColumns = () => [
  ["Day", (row) => weekday(row.day), () => "Month"],
  ["Outbound min", (row) => minutes(row.outbound), () => minutes(sum(rows, "outbound"))],
  ["Minutes", (row) => minutes(row.seconds), () => minutes(sum(rows, "seconds"))],
  ["Calls", (row) => whole(row.calls), () => whole(sum(rows, "calls"))],
  ["Not answered", (row) => whole(row.missed), () => whole(sum(rows, "missed"))],
  ["Peak", (row) => whole(row.peak), () => whole(highest(rows, "peak").peak)],
];

function showDays() {
  const columns = dayColumns();
  fillHead(find("days"), columns.map(([head]) => ({ head })));
  fillRows(find("days").tBodies[0], rows.map((row) => columns.map(([, text]) => text(row))));
  fillRows(find("days").tFoot, [columns.map(([, , foot]) => foot())]);
}

function showTiles() {
  const all = sum(rows, "calls"), answered = sum(rows, "answered"), missed = sum(rows, "missed");
  const peak = highest(rows, "peak");
  const texts = {
    calls: whole(all), "calls-note": `${whole(answered)} answered (${percent(answered, all)})`,
    missed: whole(missed), "missed-note": `${percent(missed, all)} of the calls`,
    peak: whole(peak.peak), "peak-note": peak.peak ? `on ${dayName(peak.day)}, ${peak.when}` : "",
  };
  if (calls?.knowsMissed) texts["missed-note"] += `; ${whole(calls.missed)} by FusionPBX's missed_call`;
  for (const [id, text] of Object.entries(texts)) find(id).textContent = text;
}

function drawPlots() {
  const busiest = highest(rows, "calls"), longest = highest(rows, "seconds"), peak = highest(rows, "peak");
  draw(plots.minutes, rows, `${count(sum(rows, "seconds") / 60, "minute")}; most on ${dayName(longest.day)}: ${minutes(longest.seconds)}.`,
    (row, name) => row[name] / 60);
  draw(plots.calls, rows, `${whole(sum(rows, "answered"))} answered and ${whole(sum(rows, "missed"))} not answered; most calls on ${dayName(busiest.day)}: ${whole(busiest.calls)}.`,
    (row, name) => row[name]);
  draw(plots.peak, rows, `At most ${count(peak.peak, "call")} at once.`, (row) => row.peak);
}

function showDestinations(rounding) {
  const table = find("destinations"), all = calls?.destinations ?? [], top = all.slice(0, TOP);
  table.hidden = !top.length;
  fillHead(table, [{ head: "Number called" }, { head: "Calls" }, { head: "Minutes" }, ...(rounding ? [{ head: rounding }] : [])]);
  const drawn = fillRows(table.tBodies[0], top.map(({ number, calls: made, seconds, rounded }) => [
    number ?? "none", whole(made), minutes(seconds), ...(rounding ? [minutes(rounded[rounding])] : []),
  ]));
  top.forEach(({ seconds }, index) => drawn[index].style.setProperty("--share-of", seconds / (top[0].seconds || 1)));
  if (calls) {
    find("destinations-note").textContent = !top.length ? "No outbound calls."
      : all.length > TOP ? `The ${TOP} of ${whole(all.length)} numbers that outbound calls talked to longest.`
        : "All numbers that outbound calls went to, the longest talks first.";
  }
}

export function showMonth(found, name, rounding) {
  [rows, domain, calls] = [found, name, null];
  showTiles();
  showDirections(rounding);
  showDays();
  drawPlots();
  showDestinations(rounding);
}

/** Adds what the calls tell. They must be those of the totals, unless some were stored in between. */
export function showCalls(found, rounding, least, most) {
  if (found.calls < least || found.calls > most) {
    throw new ApiError(0, `${count(found.calls, "call")} came, but call_totals counts ${whole(least)}, so what they tell is not shown.`);
  }
  calls = found;
  showTiles();
  showRounding(rounding);
}

export const hasCalls = () => calls !== null;

export function showRounding(rounding) {
  showDirections(rounding);
  showDestinations(rounding);
}

export function clearMonth() {
  [rows, calls] = [[], null];
  for (const id of ["days", "directions", "destinations"]) {
    const table = find(id);
    for (const part of [table.tHead.rows[0], table.tBodies[0], table.tFoot]) part?.replaceChildren();
  }
  for (const cell of find("numbers").querySelectorAll("dd")) cell.textContent = "";
  for (const plot of Object.values(plots)) draw(plot, [], "", () => 0);
}

find("save-days").addEventListener("click", () => {
  const head = ["day", "outbound_seconds", "inbound_seconds", "local_seconds", "other_seconds", "seconds", "calls", "answered", "not_answered", "peak"];
  const names = ["day", ...NAMES, "seconds", "calls", "answered", "missed", "peak"];
  saveTable(["days", domain, rows[0].day.slice(0, 7)], [head, ...rows.map((row) => names.map((name) => row[name]))]);
});
