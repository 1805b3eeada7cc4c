// /api/docs: every route of the service's own description, to read, to try, and as a line of curl.
//
// Drawn by ourselves. Four libraries were tried under this service's Content-Security-Policy, without a network, with axe
// (November 2026; bytes of what a browser loads, violations of the policy, findings of axe before anything is opened):
//   Swagger UI 5.35.0          1,920,795   0    6 rules (contrast 40 times); an answer of any size is drawn whole
//   Stoplight Elements 9.0.25  2,377,341   1    2 rules (required attributes, contrast)
//   RapiDoc 9.3.8                863,099   54   4 rules; asks fonts.gstatic.com, and inline styles that are refused shape it
//   Scalar 1.46.4              3,566,844   29   7 rules (buttons without a name); asks proxy.scalar.com
// All are free to use (MIT or Apache-2.0). None bounds an answer, fills in a range that has calls, or makes a line of curl
// without the token in it; and fifteen routes are no reason for two megabytes.
import { addMonths, count, daysOf, today, whole } from "./format.js";
import { Job } from "./job.js";
import { adopt, connect, end, readBody, readJson, tryOut } from "./session.js";

const TRIAL_CALLS = "20"; // what limit is set to at first
const SHOWN = 65_536; // characters of an answer; the rest is not read

const find = (id) => document.getElementById(id);
const loading = new Job(find("loading"));
let description = null;
let described = () => {};
const ready = new Promise((resolve) => (described = resolve));

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// The description -------------------------------------------------------------

/** What a $ref stands for. */
function resolve(node) {
  if (!node?.$ref) return node ?? {};
  return resolve(node.$ref.slice(2).split("/").reduce((found, name) => found[name], description));
}

/** Text with the little of Markdown that the description uses: **strong** and `code`. */
function write(text) {
  return text.split(/(\*\*.+?\*\*|`[^`]+`)/).map((part) => {
    if (part.startsWith("**")) return make("strong", {}, part.slice(2, -2));
    return part.startsWith("`") ? make("code", {}, part.slice(1, -1)) : part;
  });
}

const paragraphs = (text = "") => text.split("\n\n").filter(Boolean).map((part) => make("p", {}, ...write(part)));

function fold(title, ...content) {
  return make("details", {}, make("summary", {}, title), ...content);
}

const list = (pairs) => make("dl", {}, ...pairs.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, ...write(text))]));

/** The fields of what a route answers with, where that is one object or an array of them. */
function describeFields(operation) {
  const answer = resolve(Object.entries(operation.responses).find(([status]) => status < 300)?.[1]);
  let schema = resolve(answer.content?.["application/json"]?.schema);
  if (schema.type === "array") schema = resolve(schema.items);
  const pairs = Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const found = resolve(property);
    return [name, `${[found.type].flat().filter(Boolean).join(" or ")}. ${property.description ?? found.description ?? ""}`];
  });
  return pairs.length ? [fold(`${count(pairs.length, "field")} of the answer`, list(pairs))] : [];
}

function describeAnswers(operation) {
  return fold("Every status", list(Object.entries(operation.responses).map(([status, response]) => [status, resolve(response).description])));
}

// What is filled in -----------------------------------------------------------

const usual = { day: "", domain: "", uuids: [] }; // found after the login

function startValue(name) {
  const day = usual.day || today("UTC");
  return { limit: TRIAL_CALLS, from: day, to: day, date: day, domain_name: usual.domain, resolution: "60" }[name] ?? "";
}

/** An input for a parameter or a field of a body. */
function makeInput({ name, in: place, schema, description: text = "", required }, id) {
  const resolved = resolve(schema);
  const values = resolved.enum?.map(String) ?? (resolved.type === "boolean" ? ["true", "false"] : null);
  const input = values
    ? make("select", { name }, new Option("", ""), ...values.map((value) => new Option(value)))
    : make("input", { name, autocomplete: "off", spellcheck: false, type: resolved.format === "password" ? "password" : "text" });
  if (name === "domain_name") input.setAttribute("list", "domain-names");
  const note = make("p", { className: "note", id: `${id}-${name}-note` }, ...write(text || resolved.description || ""));
  input.setAttribute("aria-describedby", note.id);
  return make("div", {}, make("label", {}, name, ...(place === "header" ? [" (a header)"] : []), ...(required ? [make("b", {}, " needed")] : []), input), note);
}

/** What an input holds until somebody changes it. date, and cursor, are alternatives to from: only one is filled in. */
function startOf({ name, dataset }, parameters) {
  if (dataset.in === "json") return JSON.stringify({ xml_cdr_uuid: usual.uuids.length ? usual.uuids : ["00000000-0000-4000-8000-000000000000"] });
  if (dataset.in === "path") return usual.uuids[0] ?? "";
  const hasDate = parameters.some((parameter) => parameter.name === "date");
  return hasDate && (name === "from" || name === "to") ? "" : startValue(name);
}

function fillIn(form, parameters) {
  for (const input of form.elements) if (input.name && !input.dataset.touched) input.value = startOf(input, parameters);
}

async function findUsual(signal) {
  const domains = await readJson("domains", {}, signal);
  usual.domain = domains[0]?.domain_name ?? "";
  find("domain-names").replaceChildren(...domains.slice(0, 500).map(({ domain_name: name }) => new Option(name)));
  if (!usual.domain) return;
  const query = { domain_uuid: domains[0].domain_uuid };
  usual.day = await findDay(query, signal);
  if (usual.day) {
    const calls = await readJson("call_range", { ...query, from: usual.day, to: usual.day, limit: "2", fields: "xml_cdr_uuid" }, signal);
    usual.uuids = calls.map((call) => call.xml_cdr_uuid);
  }
}

/** The last day with calls in this month or the two before it; "" if there is none. */
async function findDay(query, signal) {
  const month = today().slice(0, 7);
  for (const back of [0, -1, -2]) {
    const days = daysOf(addMonths(month, back));
    const groups = await readJson("call_totals", { ...query, from: days[0], to: days.at(-1), group_by: "day" }, signal);
    if (groups.length) return groups.at(-1).day;
  }
  return "";
}

// A request -------------------------------------------------------------------

const isOpen = (operation) => operation.security?.length === 0; // to whoever has no token
const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** What a route's form asks for. */
function readForm(form, { method, path, operation }) {
  const query = new URLSearchParams(), headers = {}, body = new URLSearchParams();
  let json = null, place = path.slice(1);
  for (const { name, value, dataset } of form.elements) {
    if (!name || value === "") continue;
    if (dataset.in === "json") json = value;
    else if (dataset.in === "path") place = place.replace(`{${name}}`, encodeURIComponent(value));
    else if (dataset.in === "header") headers[name] = value;
    else (dataset.in === "body" ? body : query).append(name, value);
  }
  if (json !== null) headers["Content-Type"] = "application/json";
  const search = String(query).replaceAll("%2C", ","); // which is as good, and can be read
  return {
    url: place + (search && `?${search}`), method: method.toUpperCase(), headers, body: json ?? (String(body) ? body : undefined),
    open: isOpen(operation),
  };
}

/** The same as a line for a shell, in which TOKEN is set. */
function writeCurl({ url, method, headers, body, open }, operation) {
  const parts = ["curl -s"];
  if (method === "POST") parts.push("-X POST");
  if (!open) parts.push('-H "Authorization: Bearer $TOKEN"');
  for (const [name, value] of Object.entries(headers)) parts.push(`-H ${quote(`${name}: ${value}`)}`);
  if (typeof body === "string") parts.push(`-d ${quote(body)}`);
  else for (const [name, value] of body ?? []) parts.push(`--data-urlencode ${quote(`${name}=${value}`)}`);
  parts.push(quote(new URL(url, location).href));
  const line = parts.join(" ");
  return operation.operationId === "login" ? `TOKEN=$(${line} | sed 's/.*"token":"\\([^"]*\\)".*/\\1/')` : line;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Without https there is only this.
  const area = make("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Reads so much of an answer as is shown; the rest is not even sent. */
async function readSome(response, controller) {
  const decoder = new TextDecoder();
  let text = "";
  for await (const bytes of readBody(response, controller.signal)) {
    text += decoder.decode(bytes, { stream: true });
    if (text.length > SHOWN) {
      controller.abort();
      return { text: text.slice(0, SHOWN), cut: true };
    }
  }
  return { text, cut: false };
}

/** JSON, one member a line. Nothing but blanks changes, so that numbers stay what they are and half an answer is no error. */
function indent(text) {
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  return text.replace(/"(?:[^"\\]|\\.)*"?|[[{]\s*[\]}]|[[{}\],:]|\s+/g, (token) => {
    if (token === ",") return token + line();
    if (token === ":") return `${token} `;
    if (!/^[[{\]}]$/.test(token)) return token.trim(); // a text, an empty array or object, or blanks, which go
    const isOpening = token === "[" || token === "{";
    depth += isOpening ? 1 : -1;
    return isOpening ? token + line() : line() + token;
  });
}

async function showAnswer(place, asked, signal) {
  const controller = new AbortController();
  signal.addEventListener("abort", () => controller.abort());
  const start = performance.now();
  const response = await tryOut(asked.url, { method: asked.method, headers: asked.headers, body: asked.body, signal: controller.signal });
  const { text, cut } = await readSome(response, controller);
  const seconds = (performance.now() - start) / 1000;
  const headers = [...response.headers].filter(([name]) => /^(link|x-|ratelimit|retry-after|content-type|etag)/.test(name));
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  const size = cut ? `The first ${whole(SHOWN)} characters are shown, and the rest was not read: the line of curl gets all of it.` : "";
  place.replaceChildren(
    make("p", {}, make("strong", { className: "code" }, `${response.status} ${response.statusText}`), ` after ${whole(seconds * 1000)} ms. ${size}`),
    make("pre", { tabIndex: 0, className: "body", role: "group", ariaLabel: "Answer" }, isJson ? indent(text) : text),
    fold("Headers of the answer", list(headers.map(([name, value]) => [name, value]))),
  );
  return response.ok;
}

// A route ---------------------------------------------------------------------

const MAIN = ["domain_name", "month", "fields", "format", "cursor", "group_by"]; // beside what is needed or filled in

/** The inputs of a route's parameters; main tells those that are seen at once. */
function makeParameters({ id, parameters }) {
  return parameters.map((parameter) => {
    const field = makeInput(parameter, id);
    field.querySelector("input, select").dataset.in = parameter.in;
    return { field, main: parameter.required || startValue(parameter.name) || MAIN.includes(parameter.name) };
  });
}

/** The inputs of a body: its fields where it may be a form, else its text. */
function makeBody({ id, operation }) {
  const content = operation.requestBody?.content ?? {}, form = content["application/x-www-form-urlencoded"];
  if (form) {
    const schema = resolve(form.schema), example = Object.values(form.examples ?? {})[0]?.value ?? {};
    return Object.entries(schema.properties).map(([name, property]) => {
      const field = makeInput({ name, schema: property, required: schema.required?.includes(name) }, `${id}-body`);
      const input = field.querySelector("input, select");
      Object.assign(input.dataset, { in: "body", touched: "yes" });
      if (isOpen(operation)) input.value = example[name] ?? ""; // not of logout, whose example ends every token
      return { field, main: true };
    });
  }
  if (!content["application/json"]) return [];
  const area = make("textarea", { name: "body", rows: 4 });
  area.dataset.in = "json";
  return [{ main: true, field: make("div", {}, make("label", {}, "Body, in JSON", area)) }];
}

/** A month stands for both ends of a range, and together they are refused. */
function emptyRange(form) {
  for (const name of ["from", "to", "date"]) {
    const input = form.elements[name];
    if (input) Object.assign(input, { value: "" }).dataset.touched = "yes";
  }
}

function fillRoute(route) {
  const { operation, parameters, box } = route;
  const fields = [...makeBody(route), ...makeParameters(route)];
  const main = fields.filter((one) => one.main), more = fields.filter((one) => !one.main);
  const curl = make("pre", { className: "curl", tabIndex: 0, role: "group", ariaLabel: "The line of curl" });
  const job = new Job(make("div", { className: "job" }));
  const place = make("div", { className: "answer", ariaLive: "polite" });
  const send = make("button", { className: "primary" }, "Send");
  const copying = make("button", { type: "button" }, "Copy curl");
  const form = make("form", { noValidate: true },
    make("div", { className: "fields" }, ...main.map((one) => one.field)),
    ...(more.length ? [fold(`${count(more.length, "more parameter")}`, make("div", { className: "fields" }, ...more.map((one) => one.field)))] : []),
    make("div", { className: "actions" }, send, copying));
  const limited = main.some((one) => one.field.querySelector("[name=limit]"));
  route.form = form;
  route.refresh = () => {
    fillIn(form, parameters);
    curl.textContent = writeCurl(readForm(form, route), operation);
  };
  form.addEventListener("input", (event) => {
    event.target.dataset.touched = "yes";
    if (event.target.name === "month" && event.target.value) emptyRange(form);
    curl.textContent = writeCurl(readForm(form, route), operation);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask(route, job, place);
  });
  copying.addEventListener("click", async () => {
    await copy(curl.textContent);
    copying.textContent = "Copied";
    setTimeout(() => (copying.textContent = "Copy curl"), 2000);
  });
  box.append(make("div", {},
    ...paragraphs(operation.description),
    ...(limited ? [make("p", { className: "note" }, `limit is set to ${TRIAL_CALLS} here, so that a trial stays small. Without it the service sends every call.`)] : []),
    form, curl,
    ...(isOpen(operation) ? [] : [make("p", { className: "note" }, "$TOKEN is the token; the curl line of POST /login sets it.")]),
    job.root, place, ...describeFields(operation), describeAnswers(operation)));
  route.refresh();
}

async function ask(route, job, place) {
  const asked = readForm(route.form, route);
  place.replaceChildren();
  let good = false;
  await job.run("Asking …", () => ask(route, job, place), async (signal) => {
    good = await showAnswer(place, asked, signal);
  });
  if (good && route.operation.operationId === "logout") end("Logged out by POST /logout.");
}

const routes = [];

function drawRoute(path, method, operation) {
  const id = operation.operationId;
  const box = make("details", { className: "route", id: `route-${id}` },
    make("summary", {}, make("span", { className: `method ${method}` }, method.toUpperCase()), make("span", { className: "path" }, path),
      make("span", { className: "note" }, operation.summary)));
  const route = { path, method, operation, id, box, parameters: (operation.parameters ?? []).map(resolve) };
  box.addEventListener("toggle", () => {
    if (box.open && !route.form) fillRoute(route);
    if (box.open) history.replaceState(null, "", `#${id}`);
  });
  routes.push(route);
  return box;
}

function draw() {
  const { info, tags, paths } = description;
  find("title").textContent = info.title;
  const [begin, ...rules] = paragraphs(info.description.slice(info.description.indexOf("\n\n")));
  find("intro").replaceChildren(make("p", {}, `${info.summary}. Version ${info.version}, described in `, make("a", { href: "openapi.json" }, "openapi.json"), "."),
    begin, rules.shift(), fold("Rules for every route", ...rules));
  for (const { name, description: text } of tags) {
    find("routes").append(make("h2", { className: "group" }, name), make("p", { className: "note" }, ...write(text)));
    for (const [path, methods] of Object.entries(paths)) {
      for (const [method, operation] of Object.entries(methods)) if (operation.tags[0] === name) find("routes").append(drawRoute(path, method, operation));
    }
  }
  find("routes").append(make("datalist", { id: "domain-names" }));
}

function openFragment() {
  const box = find(`route-${location.hash.slice(1)}`);
  if (!box) return;
  box.open = true;
  box.scrollIntoView();
}

const refresh = () => routes.forEach((route) => route.refresh?.());

async function open() {
  await ready;
  await loading.run("Looking for a day that has calls …", open, findUsual);
  refresh();
}

function close() {
  loading.stop();
  Object.assign(usual, { day: "", domain: "", uuids: [] });
  for (const { box } of routes) box.querySelector(".answer")?.replaceChildren();
  find("domain-names")?.replaceChildren();
  refresh();
}

find("adopt").addEventListener("click", () => {
  const pasted = find("pasted").value.trim();
  find("pasted").value = "";
  if (pasted) open(adopt(pasted));
});

async function start() {
  const done = await loading.run("Reading the description …", start, async (signal) => {
    description = await readJson("openapi.json", {}, signal);
  });
  if (!done) return;
  draw();
  openFragment();
  described();
}

addEventListener("hashchange", () => description && openFragment());
connect(open, close);
start();
