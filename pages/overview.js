// All domains of a month: a row for each, from one request for the totals.
import { addMonths, change, count, minutes, monthName, percent, whole } from "./format.js";
import { saveTable } from "./files.js";
import { readBatches } from "./session.js";
import { PEAK, fileRows, fillHead, fillRows, makeLink, sum } from "./table.js";

const PAGE = 50; // rows that are drawn at once
const PEAKS_AT_ONCE = 300; // domains whose peaks are worked out without being asked for
const DIRECTIONS = ["outbound", "inbound", "local"];

const find = (id) => document.getElementById(id);
const table = find("domain-rows");

let rows = []; // of the month that is shown
let hasOther = false, hasPeaks = false;
let first = 0; // of the page
let view = null; // month, find, sort; how to change them; and how its files are called

const emptyRow = (name, uuid, key) => ({
  name, uuid, key, calls: 0, answered: 0, seconds: 0, before: 0, callsBefore: 0, outbound: 0, inbound: 0, local: 0, other: 0, peak: 0,
});

/** Folds groups of call_totals into rows; strays are calls of no domain, which only who reads everything gets. */
function makeRows(domains, month) {
  const byUuid = new Map(domains.map(({ domain_uuid: uuid, domain_name: name, key }) => [uuid, emptyRow(name, uuid, key)]));
  const bearers = new Map();
  for (const row of byUuid.values()) bearers.set(row.name, [...(bearers.get(row.name) ?? []), row]);
  const strays = new Map();
  const rowOf = (uuid, name) => {
    if (byUuid.has(uuid)) return byUuid.get(uuid);
    const named = uuid === null ? bearers.get(name) : null;
    if (named?.length === 1) return named[0];
    if (!strays.has(name)) strays.set(name, emptyRow(`${name ?? "(none)"} (no domain)`, null, null));
    return strays.get(name);
  };
  return {
    add({ domain_uuid: uuid, domain_name: name, direction, month: when, calls, answered, billsec }) {
      const row = rowOf(uuid, name);
      if (when !== month) {
        row.before += billsec;
        row.callsBefore += calls;
        return;
      }
      row.calls += calls;
      row.answered += answered;
      row.seconds += billsec;
      row[DIRECTIONS.includes(direction) ? direction : "other"] += billsec;
    },
    all: () => [...byUuid.values(), ...strays.values()],
  };
}

/** Reads the month and the one before it. */
export async function readOverview(domains, month, query, signal, progress) {
  const made = makeRows(domains, month);
  const range = { from: `${addMonths(month, -1)}-01`, to: query.to, group_by: "month,domain_uuid,domain_name,direction" };
  let read = 0;
  for await (const batch of readBatches("call_totals", { ...query, ...range }, signal)) {
    batch.forEach(made.add);
    progress((read += batch.length));
  }
  return made.all();
}

/** Reads the highest number of calls at once of each domain; progress is told of how many domains. */
export async function readPeaks(query, signal, progress) {
  const peaks = new Map();
  for await (const batch of readBatches("concurrent_calls_by_domain", { ...query, resolution: "60", active_only: "true" }, signal)) {
    for (const { domain_name: name, active_calls: peak } of batch) {
      if (peak > (peaks.get(name) ?? 0)) peaks.set(name, peak);
    }
    progress(peaks.size);
  }
  signal.throwIfAborted();
  for (const row of rows) row.peak = peaks.get(row.name) ?? 0;
  hasPeaks = true;
  render();
}

export const wantsPeaks = () => activeRows().length <= PEAKS_AT_ONCE;
export const activeRows = () => rows.filter((row) => row.calls);

// The table -------------------------------------------------------------------

const minutesColumn = (name, head) => ({
  name, head, csv: `${name}_seconds`, value: (row) => row[name], text: (row) => minutes(row[name]), foot: (shown) => minutes(sum(shown, name)),
});

const peakOf = (shown) => (shown.length === 1 ? whole(shown[0].peak)
  : Object.assign(document.createElement("span"), { textContent: "–", title: "The peaks of several domains cannot be added." }));

function columns() {
  const total = sum(rows, "seconds");
  return [
    { name: "domain", head: "Domain", csv: "domain", value: (row) => row.name, foot: (shown) => count(shown.length, "domain"),
      text: (row) => (row.key === null ? row.name : makeLink(row.name, view.link({ domain: row.key, find: "", sort: "" }))) },
    { ...minutesColumn("seconds", "All minutes"), name: "minutes", csv: "seconds" },
    minutesColumn("outbound", "Outbound minutes"), minutesColumn("inbound", "Inbound minutes"), minutesColumn("local", "Internal minutes"),
    ...(hasOther ? [minutesColumn("other", "Other minutes")] : []),
    { name: "share", head: "Share", value: (row) => row.seconds, text: (row) => percent(row.seconds, total),
      foot: (shown) => percent(sum(shown, "seconds"), total) },
    // A part of a month is not compared with a whole one.
    ...(view.unfinished ? [] : [{ name: "change", head: "Change", csv: "seconds_month_before", value: (row) => row.before,
      order: (row) => (row.before ? row.seconds / row.before : row.seconds ? Infinity : -1),
      text: (row) => change(row.seconds, row.before), foot: (shown) => change(sum(shown, "seconds"), sum(shown, "before")) }]),
    { name: "calls", head: "Calls", csv: "calls", value: (row) => row.calls, text: (row) => whole(row.calls), foot: (shown) => whole(sum(shown, "calls")) },
    { name: "answered", head: "Answered", csv: "answered", value: (row) => row.answered, text: (row) => whole(row.answered),
      foot: (shown) => whole(sum(shown, "answered")) },
    ...(hasPeaks ? [{ name: "peak", head: PEAK, csv: "peak", value: (row) => row.peak, text: (row) => whole(row.peak), foot: peakOf }] : []),
  ];
}

const names = new Intl.Collator(undefined, { numeric: true });

/** The rows that are looked for, in their order. Without a word only those with calls. */
function chosen(all) {
  const words = view.find.toLocaleLowerCase();
  const pool = rows.filter(words ? (row) => row.name.toLocaleLowerCase().includes(words) : (row) => row.calls || row.callsBefore);
  const [name, down] = view.sort.split(":");
  const column = all.find((known) => known.name === name) ?? all.find((known) => known.name === "outbound");
  const order = column.order ?? column.value;
  const compare = column.name === "domain" ? (a, b) => names.compare(a.name, b.name) : (a, b) => order(a) - order(b) || names.compare(b.name, a.name);
  return { column, down: down !== "up", found: pool.sort(down === "up" ? compare : (a, b) => compare(b, a)) };
}

export function showOverview(found, next) {
  rows = found;
  hasOther = rows.some((row) => row.other);
  hasPeaks = false;
  showPage(next);
}

/** Shows the rows by another word or order, from the first on. */
export function showPage(next) {
  view = next;
  first = 0;
  render();
}

function render() {
  const all = columns();
  const { column, down, found } = chosen(all);
  const by = ({ name }) => view.change({ sort: `${name}:${name === column.name ? (down ? "up" : "down") : name === "domain" ? "up" : "down"}` });
  const focused = table.tHead.contains(document.activeElement) ? document.activeElement.textContent : null;
  fillHead(table, all, { name: column.name, down, by });
  if (focused) [...table.tHead.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
  fillRows(table.tBodies[0], found.slice(first, first + PAGE).map((row) => all.map((one) => one.text(row))));
  fillRows(table.tFoot, found.length ? [all.map((one) => one.foot(found))] : []);
  const last = Math.min(first + PAGE, found.length);
  find("shown").textContent = found.length > PAGE ? `${whole(first + 1)} to ${whole(last)} of ${whole(found.length)}` : found.length ? "" : `No domain's name contains ${view.find}.`;
  find("page-back").hidden = find("page-on").hidden = found.length <= PAGE;
  find("page-back").disabled = !first;
  find("page-on").disabled = last === found.length;
  find("peaks").hidden = hasPeaks || wantsPeaks();
  const silent = rows.filter((row) => !row.calls && !row.callsBefore).length;
  const before = monthName(addMonths(view.month, -1));
  find("domains-note").textContent = (view.unfinished ? `This month is not over yet, so it is not compared with ${before}.` : `Change compares the minutes with those of ${before}.`)
    + (silent ? ` ${count(silent, "more domain has", "more domains have")} no calls in either month; Find shows them.` : "");
}

export function clearOverview() {
  rows = [];
  for (const part of [table.tHead.rows[0], table.tBodies[0], table.tFoot]) part.replaceChildren();
}

find("page-back").addEventListener("click", () => {
  first -= PAGE;
  render();
});
find("page-on").addEventListener("click", () => {
  first += PAGE;
  render();
});
find("save-domains").addEventListener("click", () => {
  const all = columns();
  saveTable(["domains", ...view.fileParts], fileRows(all, chosen(all).found));
});
find("find").addEventListener("input", () => view.change({ find: find("find").value }));
find("find").addEventListener("keydown", (event) => {
  const links = table.tBodies[0].querySelectorAll("a");
  if (event.key === "Enter" && links.length === 1) location.hash = links[0].hash;
});
