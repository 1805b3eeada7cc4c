// One domain's month: its totals at once, then, from its calls, what sums cannot tell.
import { between, count, dayName, minutes, percent, weekday, whole } from "./format.js";
import { saveTable } from "./files.js";
import { draw, plots } from "./plots.js";
import { ApiError, readBatches, readJson } from "./session.js";
import { PEAK, fileRows, fillHead, fillRows, sum } from "./table.js";

const TOP = 10;
export const DIRECTIONS = { outbound: "Outbound", inbound: "Inbound", local: "Internal", other: "Other" };
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
  const empty = { calls: 0, answered: 0, missed: 0, seconds: 0, outbound: 0, inbound: 0, local: 0, other: 0, peak: 0, start: "", stop: "" };
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
    if (row && peak > row.peak) Object.assign(row, { peak, start, stop });
  }
  return [...rows.values()];
}

/** What is told by the calls alone: roundings by day and direction, FusionPBX's missed calls, and where outbound calls went. */
export async function readCalls(query, signal, progress) {
  const found = { calls: 0, missed: 0, knowsMissed: false, rounded: new Map() };
  const destinations = new Map();
  const fields = "end_stamp,direction,billsec,missed_call,destination_number";
  for await (const batch of readBatches("call_range", { ...query, fields }, signal)) {
    for (const { end_stamp: end, direction, billsec, missed_call: missed, destination_number: number } of batch) {
      found.missed += missed === true;
      found.knowsMissed ||= missed !== null;
      const day = end.slice(0, 10);
      if (!found.rounded.has(day)) found.rounded.set(day, Object.fromEntries(NAMES.map((name) => [name, nothingRounded()])));
      const sums = [found.rounded.get(day)[directionOf(direction)]];
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
let rounding = ""; // one of ROUNDINGS, or none
let fileParts = []; // how its files are called
let calls = null; // of readCalls, once they are there

/** A column of table.js, whose foot is the sum. Without a head it is only in the file, without csv only on the page. */
const column = (head, csv, value, write, foot = (all) => write(all.reduce((total, row) => total + value(row), 0))) =>
  ({ head, csv, value, text: (row) => write(value(row)), foot });

const roundedOf = (days, names) => sum(days.flatMap((day) => names.map((name) => calls?.rounded.get(day)?.[name] ?? nothingRounded())), rounding);
const writeRounded = (seconds) => (calls ? minutes(seconds) : "…");
const roundedDays = () => [...(calls?.rounded.keys() ?? [])];
const csvRounded = (name = "seconds") => `${name}_${rounding.replace("/", "_")}`;

function showTable(table, columns, all) {
  const shown = columns.filter(({ head }) => head);
  fillHead(table, shown);
  if (table.tFoot) fillRows(table.tFoot, [shown.map(({ foot }) => foot(all))]);
  return fillRows(table.tBodies[0], all.map((row) => shown.map(({ text }) => text(row))));
}

const directionRows = () => NAMES.map((name) => {
  const parts = rows.map((row) => row.byDirection[name]).filter(Boolean);
  return { name, calls: sum(parts, "calls"), answered: sum(parts, "answered"), seconds: sum(rows, name) };
}).filter((part) => part.calls);

/** Minutes by direction, and beside them rounded where that was asked for and the calls are there. */
function directionColumns() {
  const total = sum(rows, "seconds");
  return [
    column("Direction", "direction", (part) => part.name, (name) => DIRECTIONS[name], () => "All"),
    column("Calls", "calls", (part) => part.calls, whole),
    column("Answered", "answered", (part) => part.answered, whole),
    column("Not answered", "not_answered", (part) => part.calls - part.answered, whole),
    column("Seconds", "seconds", (part) => part.seconds, whole),
    column("Minutes", "", (part) => part.seconds, minutes),
    column("Share", "", (part) => part.seconds, (seconds) => percent(seconds, total)),
    ...(rounding ? [column(`Rounded up ${rounding}`, csvRounded(), (part) => roundedOf(roundedDays(), [part.name]), writeRounded)] : []),
  ];
}

function showDirections() {
  const parts = directionRows();
  showTable(find("directions"), directionColumns(), parts);
  for (const name of ["outbound", "inbound", "local"]) {
    const part = parts.find((one) => one.name === name), counted = minutes(part?.seconds ?? 0);
    const isRounded = rounding && calls;
    find(name).textContent = isRounded ? minutes(roundedOf(roundedDays(), [name])) : counted;
    find(`${name}-note`).textContent = !part ? "no calls"
      : `${isRounded ? `rounded up ${rounding}; counted: ${counted}; ` : rounding ? "not rounded yet; " : ""}${count(part.calls, "call")}`;
  }
}

function dayColumns() {
  const roundedColumn = (head, csv, names) => (rounding
    ? [column(head && `${head} ${rounding}`, csvRounded(csv), (row) => roundedOf([row.day], names), writeRounded)] : []);
  const inFile = (name) => [column("", `${name}_seconds`, (row) => row[name], whole), ...roundedColumn("", `${name}_seconds`, [name])];
  return [
    column("Day", "day", (row) => row.day, weekday, () => "Month"),
    column("Outbound minutes", "outbound_seconds", (row) => row.outbound, minutes),
    ...roundedColumn("Outbound", "outbound_seconds", ["outbound"]),
    ...["inbound", "local", "other"].flatMap(inFile),
    column("All minutes", "seconds", (row) => row.seconds, minutes),
    ...roundedColumn("", "seconds", NAMES),
    column("Calls", "calls", (row) => row.calls, whole),
    column("", "answered", (row) => row.answered, whole),
    column("Not answered", "not_answered", (row) => row.missed, whole),
    column(PEAK, "peak", (row) => row.peak, whole, (all) => whole(highest(all, "peak").peak)),
  ];
}

function showTiles() {
  const all = sum(rows, "calls"), answered = sum(rows, "answered"), missed = sum(rows, "missed");
  const peak = highest(rows, "peak");
  const texts = {
    calls: whole(all), "calls-note": `${whole(answered)} answered (${percent(answered, all)})`,
    missed: whole(missed), "missed-note": `${percent(missed, all)} of the calls`,
    peak: whole(peak.peak), "peak-note": peak.peak ? between(peak.start, peak.stop) : "",
  };
  if (calls?.knowsMissed) texts["missed-note"] += ` (FusionPBX itself calls ${whole(calls.missed)} missed)`;
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

const destinationColumns = () => [
  column("Number called", "destination_number", (row) => row.number, (number) => number ?? "none"),
  column("Calls", "calls", (row) => row.calls, whole),
  column("Minutes", "seconds", (row) => row.seconds, minutes),
  ...(rounding ? [column(rounding, csvRounded(), (row) => row.rounded[rounding], minutes)] : []),
];

function showDestinations() {
  const table = find("destinations"), all = calls?.destinations ?? [], top = all.slice(0, TOP);
  table.hidden = find("save-destinations").hidden = !top.length;
  const drawn = showTable(table, destinationColumns(), top);
  top.forEach(({ seconds }, index) => drawn[index].style.setProperty("--share-of", seconds / (top[0].seconds || 1)));
  if (calls) {
    find("destinations-note").textContent = !top.length ? "No outbound calls."
      : all.length > TOP ? `The ${TOP} of ${whole(all.length)} numbers called with the most outbound minutes. The file has all of them.`
        : "All numbers that were called, the most minutes first.";
  }
}

export function showMonth(found, parts, round) {
  [rows, fileParts, calls] = [found, parts, null];
  showTiles();
  showRounding(round);
  drawPlots();
}

/** Adds what the calls tell. They must be those of the totals, unless some were stored in between. */
export function showCalls(found, least, most) {
  if (found.calls < least || found.calls > most) {
    throw new ApiError(0, `${count(found.calls, "call")} arrived instead of ${whole(least)}, so they were thrown away.`);
  }
  calls = found;
  showTiles();
  showRounding(rounding);
}

export const hasCalls = () => calls !== null;

/** Shows the month by another rounding. Until the calls are there its files cannot be had. */
export function showRounding(round) {
  rounding = round;
  showDirections();
  showTable(find("days"), dayColumns(), rows);
  showDestinations();
  find("save-days").disabled = find("save-directions").disabled = Boolean(rounding) && !calls;
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

function saveOnClick(name, columnsOf, rowsOf) {
  find(`save-${name}`).addEventListener("click", () => saveTable([name, ...fileParts, rounding], fileRows(columnsOf(), rowsOf())));
}

saveOnClick("directions", directionColumns, directionRows);
saveOnClick("days", dayColumns, () => rows);
saveOnClick("destinations", destinationColumns, () => calls.destinations);
