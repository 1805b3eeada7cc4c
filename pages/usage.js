// /api/usage: all domains of a month, or one of them. Every number comes from the public routes; nothing is kept.
//
// What is shown stands in the URL's fragment (month, domain, tz, calls, round, find, sort), so that a link shows the same
// view and Back leads back. Controls change the fragment, and whatever changes it leads to follow().
import { addMonths, count, daysOf, monthName, today, whole, zoneName } from "./format.js";
import { saveCalls } from "./files.js";
import { Job } from "./job.js";
import { clearMonth, hasCalls, readCalls, readDays, showCalls, showMonth, showRounding } from "./month.js";
import { activeRows, clearOverview, readOverview, readPeaks, showOverview, showPage, wantsPeaks } from "./overview.js";
import { connect, readBatches, readJson } from "./session.js";
import { makeLink, sum } from "./table.js";

const CALLS_AT_ONCE = 200_000; // a month of more calls is read call by call only when that is asked for
const FILE_FIELDS = "xml_cdr_uuid,domain_name,direction,start_stamp,answer_stamp,end_stamp,duration,billsec,caller_id_name,"
  + "caller_id_number,source_number,caller_destination,destination_number,accountcode,leg,missed_call,hangup_cause";

const find = (id) => document.getElementById(id);
const choice = find("choice").elements;
const reading = new Job(find("reading"));
const saving = new Job(find("saving"));
const ownZone = Intl.DateTimeFormat().resolvedOptions().timeZone;
const serviceZone = document.documentElement.dataset.zone;

let domains = null; // of the account, once they are read
let shown = null; // the view whose numbers are on the page

// The view --------------------------------------------------------------------

const DEFAULTS = { month: "", domain: "", tz: "", calls: "billable", round: "", find: "", sort: "" };

function readFragment() {
  const view = { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
  view.zone = view.tz || serviceZone;
  if (!/^\d{4}-(0[1-9]|1[0-2])$/.test(view.month)) view.month = currentMonth(view.zone);
  if (![...choice.rounding.options].some((option) => option.value === view.round)) view.round = "";
  view.unfinished = view.month === currentMonth(view.zone);
  return view;
}

const currentMonth = (zone) => today(zone).slice(0, 7);

function makeFragment(changes) {
  const view = { ...readFragment(), ...changes };
  const pairs = Object.entries(DEFAULTS).map(([name, usual]) => [name, view[name], usual]).filter(([, value, usual]) => value !== usual);
  return `#${new URLSearchParams(pairs.map(([name, value]) => [name, value]))}`;
}

/** Changes the view. What is typed leaves no steps to go back through. */
function change(changes) {
  const fragment = makeFragment(changes);
  if (fragment === location.hash) return;
  if ("find" in changes || "sort" in changes) history.replaceState(null, "", fragment);
  else history.pushState(null, "", fragment);
  follow();
}

const isSame = (a, b) => ["month", "domain", "tz", "calls"].every((name) => a[name] === b[name]);
/** How the files of a view are called: what tells two of them apart is in the name. */
const filePartsOf = (view) => [view.domain, view.month, view.calls === "all" ? "every-record" : "each-conversation-once", zoneName(view.zone)];
const domainOf = (view) => domains.find(({ key }) => key === view.domain);
const nameOf = (view) => `${view.domain ? domainOf(view)?.domain_name ?? view.domain : "All domains"}, ${monthName(view.month)}`;

function queryOf(view) {
  const days = daysOf(view.month);
  const domain = domainOf(view);
  return {
    from: days[0], to: days.at(-1), billable_only: String(view.calls !== "all"),
    ...(view.tz && { tz: view.tz }), ...(domain && { domain_uuid: domain.domain_uuid }),
  };
}

// The page --------------------------------------------------------------------

function fillControls(view) {
  choice.month.value = view.month;
  if (![...choice.zone.options].some((option) => option.value === view.tz)) choice.zone.add(new Option(view.tz));
  choice.zone.value = view.tz;
  choice.legs.value = view.calls;
  choice.rounding.value = view.round;
  if (document.activeElement !== find("find")) find("find").value = view.find;
  find("rounding").hidden = !view.domain;
  find("up").hidden = !view.domain || domains.length < 2;
  find("up").firstElementChild.href = makeFragment({ domain: "" });
}

/** Takes the numbers off the page. It keeps its height meanwhile, so that nothing jumps. */
function clear() {
  find("report").style.minHeight = shown ? `${find("report").offsetHeight}px` : "";
  shown = null;
  find("numbers").hidden = find("domains").hidden = true;
  find("meaning").textContent = "";
  find("actions").hidden = true;
  clearMonth();
  clearOverview();
}

function startReading() {
  find("report").setAttribute("aria-busy", "true");
}

// A field opens the keyboard of a phone, so there nothing but the heading takes the focus by itself.
const hasDesk = () => matchMedia("(pointer: fine) and (min-width: 600px)").matches;

/** Where the keyboard goes on, when what it was at has left the page. */
function takeFocus(field) {
  if (document.activeElement !== document.body) return;
  if (field && hasDesk()) field.focus({ preventScroll: true });
  else find("title").focus();
}

function rest(...said) {
  if (said.length) reading.say(...said);
  find("report").style.minHeight = "";
  find("report").setAttribute("aria-busy", "false");
}

function showFrame(view) {
  find("actions").hidden = false;
  find("save-calls").hidden = !view.domain;
  find("meaning").textContent = `A call counts on the day on which it ended (time zone ${zoneName(view.zone) || "of the PBX"}). Minutes count from the moment`
    + " of the answer. A call that nobody answered has 0 minutes; FusionPBX counts missed calls differently. "
    + (view.calls === "all" ? "Every record: each leg of a call is counted by itself, so a conversation may count several times."
      : "Each conversation once: a call that rang several phones counts as one. Calls that cost nothing are counted too.")
    + " Each figure is rounded to a tenth by itself, so sums may differ in the last digit; the files have exact seconds.";
}

/** Shows what the fragment says; reads only what is not on the page already. */
function follow() {
  let view = readFragment();
  if (!view.domain && domains.length === 1) view = { ...view, domain: domains[0].key };
  fillControls(view);
  find("title").textContent = domains.length ? nameOf(view) : "No domain yet";
  document.title = `${find("title").textContent} · Usage · CDR API`;
  if (shown && isSame(shown, view)) {
    shown = view;
    if (view.domain) showRounding(view.round);
    else showPage(listView(view));
    if (view.domain && view.round && !hasCalls() && !reading.controller) loadCalls(true);
    return;
  }
  load(view);
}

const listView = (view) => ({ ...view, change, link: makeFragment, fileParts: filePartsOf(view) });

/** Why there is nothing to read: a sentence, and what may stand behind it. */
function findNothing(view) {
  const current = currentMonth(view.zone), email = find("who").textContent;
  if (!domains.length) {
    const who = email.includes("@") ? email : "EMAIL"; // a token that was pasted tells none
    return [`Ask the operator of the telephone system for access. The command on the PBX: cdr-api user grant ${who} DOMAIN`];
  }
  if (view.domain && !domainOf(view)) return [`This account reads no domain called ${view.domain}.`];
  if (view.month <= current) return null;
  return [`${monthName(view.month)} has not begun yet. `, makeLink(`Show ${monthName(current)}`, makeFragment({ month: current }))];
}

async function load(view) {
  reading.stop();
  if (!saving.controller) saving.say(""); // of another view
  clear();
  const nothing = findNothing(view);
  if (nothing) return rest(...nothing);
  startReading();
  const done = await reading.run(`Reading ${nameOf(view)} …`, () => load(view), (signal) => (view.domain ? loadMonth : loadOverview)(view, signal));
  if (reading.controller) return; // it reads another view by now
  if (!done) return rest();
  if (!shown) return rest(`${view.domain ? "No calls" : "No calls of any domain"} ended in ${monthName(view.month)}.`);
  await (view.domain ? loadCalls(Boolean(view.round)) : loadPeaks(false));
}

// All domains -----------------------------------------------------------------

async function loadOverview(view, signal) {
  const rows = await readOverview(domains, view.month, queryOf(view), signal, (read) => reading.progress(0, 0, count(read, "line")));
  signal.throwIfAborted();
  if (!rows.some((row) => row.calls || row.callsBefore)) return;
  find("domains").hidden = false;
  showOverview(rows, listView(readFragment()));
  showFrame(view);
  shown = view;
  takeFocus(find("find"));
}

async function loadPeaks(asked) {
  if (!wantsPeaks() && !asked) return rest();
  const total = activeRows().length;
  startReading();
  await reading.run("Working out the peaks …", () => loadPeaks(true), (signal) =>
    readPeaks(queryOf(shown), signal, (seen) => reading.progress(seen, total, `${whole(seen)} of ${count(total, "domain")}`)));
  if (!reading.controller) rest();
}

// One domain ------------------------------------------------------------------

let totals = null; // the number of calls by the totals that are shown

async function loadMonth(view, signal) {
  const days = daysOf(view.month);
  const rows = await readDays(queryOf(view), days, signal);
  signal.throwIfAborted();
  if (!sum(rows, "calls")) return;
  // Of a month that is not over no days are shown that are still to come, but for calls from a clock that is ahead.
  const until = view.unfinished ? Math.max(Number(today(view.zone).slice(8)), rows.findLastIndex((row) => row.calls) + 1) : rows.length;
  find("numbers").hidden = false; // before the plots, which have no size else
  totals = sum(rows, "calls");
  shown = view;
  find("destinations-note").textContent = "";
  showMonth(rows.slice(0, until), filePartsOf(view), view.round);
  showFrame(view);
  takeFocus();
}

async function loadCalls(asked) {
  find("read-calls").hidden = true;
  if (totals > CALLS_AT_ONCE && !asked) {
    find("destinations-note").textContent = `For this, and to round, ${count(totals, "call")} have to be read one by one.`;
    find("read-calls").hidden = false;
    return rest();
  }
  find("destinations-note").textContent = "Reading the calls …";
  startReading();
  const query = queryOf(shown);
  const done = await reading.run("Reading the calls …", () => loadCalls(true), async (signal) => {
    const found = await readCalls(query, signal, (read) => reading.progress(read, totals, `${whole(read)} of ${count(totals, "call")}`));
    const [{ calls: now }] = found.calls === totals ? [{ calls: totals }] : await readJson("call_totals", query, signal);
    signal.throwIfAborted();
    showCalls(found, totals, now);
  });
  if (reading.controller || !shown) return; // it reads another view by now, or the visit is over
  if (!done) find("destinations-note").textContent = "The calls were not read.";
  rest();
}

// A visit ---------------------------------------------------------------------

async function readDomains(signal) {
  const found = [];
  for await (const batch of readBatches("domains", {}, signal)) found.push(...batch);
  const bearers = new Map();
  for (const { domain_name: name } of found) bearers.set(name, (bearers.get(name) ?? 0) + 1);
  // What names a domain in the fragment: its name, where no other bears it.
  return found.map((domain) => ({ ...domain, key: bearers.get(domain.domain_name) === 1 ? domain.domain_name : domain.domain_uuid }));
}

async function open() {
  find("report").hidden = false;
  find("choice").hidden = true;
  const done = await reading.run("Reading the domains …", open, async (signal) => {
    domains = await readDomains(signal);
  });
  if (!done) return;
  find("choice").hidden = !domains.length;
  follow();
}

function close() {
  for (const job of [reading, saving]) job.stop();
  domains = null;
  clear();
  find("report").style.minHeight = "";
  find("report").hidden = find("up").hidden = true;
  find("title").textContent = "Usage";
  document.title = "Usage · CDR API";
}

function fillZones() {
  const service = serviceZone ? `Of the PBX: ${zoneName(serviceZone)}` : "Of the PBX";
  choice.zone.replaceChildren(new Option(service, ""), new Option(`Browser: ${ownZone}`, ownZone));
  for (const zone of Intl.supportedValuesOf("timeZone")) if (zone !== ownZone) choice.zone.add(new Option(zone, zone));
  if (ownZone !== "UTC") choice.zone.add(new Option("UTC", "UTC"));
}

fillZones();
find("choice").addEventListener("change", () => {
  // Firefox has no field for months: it takes text, and says what is wrong with it. Elsewhere a year is being typed.
  if (!(choice.month.type === "text" ? choice.month.reportValidity() : choice.month.checkValidity())) return;
  change({ month: choice.month.value, tz: choice.zone.value, calls: choice.legs.value, round: choice.rounding.value });
});
find("choice").addEventListener("submit", (event) => event.preventDefault());
find("previous").addEventListener("click", () => change({ month: addMonths(readFragment().month, -1) }));
find("next").addEventListener("click", () => change({ month: addMonths(readFragment().month, 1) }));
find("print").addEventListener("click", () => print());
find("peaks").addEventListener("click", () => loadPeaks(true));
find("read-calls").addEventListener("click", () => loadCalls(true));
find("save-calls").addEventListener("click", () => saveCalls(saving, filePartsOf(shown), queryOf(shown), FILE_FIELDS));
addEventListener("hashchange", () => domains && follow());
connect(open, close);
if (!find("login").hidden && hasDesk()) find("login").elements.email.focus();
