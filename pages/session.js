// Logging in and out, and asking the API, for both pages.
//
// The token is kept in this variable. localStorage and sessionStorage belong to the whole origin, and behind FusionPBX's
// own nginx that is FusionPBX's origin too: a script in one of its pages could read a token there. Only on the way from
// one of the two pages to the other does it lie in sessionStorage: put there when the browser begins to go, taken out by
// the first line that the next page runs. Leaving for anywhere else logs out, and so does a reload, which a page cannot
// tell from that.
const HANDED = "cdr-api-handed-over";
const HANDED_SECONDS = 30; // what lies there longer belongs to a page that never came

const UNREACHABLE = "The service cannot be reached. Look at your connection, then try again.";
const BROKEN = "The answer broke off before its end, so it was thrown away.";

let token = null;
let email = ""; // of the account; "" where the token was pasted, which may be a program's, and is never deleted by us
let closed = () => {};

/** What went wrong, in a sentence for people; status is that of the answer, 0 where there was none. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function explain(response) {
  const problem = await response.json().catch(() => null);
  return new ApiError(response.status, problem?.message ?? `The service does not answer as it should (status ${response.status}).`);
}

/** Without FusionPBX's cookies, and never to another place. */
async function request(path, options) {
  try {
    return await fetch(path, { cache: "no-store", credentials: "omit", redirect: "error", ...options });
  } catch (error) {
    throw options.signal?.aborted ? error : new ApiError(0, UNREACHABLE);
  }
}

const bearer = () => (token ? { Authorization: `Bearer ${token}` } : {});

/** Whatever the service answers, with the visit's token if there is one. ApiError only where there is no answer. */
export const tryOut = (path, options) => request(path, { ...options, headers: { ...options.headers, ...bearer() } });

/** An answer that is 2xx, else ApiError. A token that is no longer good is asked for again, in place. */
export async function send(path, options = {}) {
  for (;;) {
    const used = token;
    const response = await tryOut(path, options);
    if (response.ok) return response;
    const error = await explain(response);
    if (error.status !== 401 || !used) throw error;
    if (token === used) await renew();
    options.signal?.throwIfAborted();
  }
}

const ask = (path, parameters, signal) => send(`${path}?${new URLSearchParams(parameters)}`, { signal });

export async function readJson(path, parameters = {}, signal) {
  const response = await ask(path, parameters, signal);
  return response.json().catch((error) => {
    throw signal?.aborted ? error : new ApiError(0, BROKEN);
  });
}

/** The bytes of an answer as they arrive; ApiError when it breaks off. */
export async function* readBody(response, signal) {
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal?.aborted ? error : new ApiError(0, BROKEN);
    });
    if (done) return;
    yield value;
  }
}

export async function* readBytes(path, parameters, signal) {
  yield* readBody(await ask(path, parameters, signal), signal);
}

/** The objects of an NDJSON answer in batches, as they arrive. ApiError when it breaks off. */
export async function* readBatches(path, parameters, signal) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of readBytes(path, { ...parameters, format: "ndjson" }, signal)) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = lines.pop();
    if (lines.length) yield JSON.parse(`[${lines.join(",")}]`);
  }
  if (rest) throw new ApiError(0, BROKEN);
}

const find = (id) => document.getElementById(id);

async function logIn(form) {
  const response = await request("login", { method: "POST", body: new URLSearchParams(new FormData(form)) });
  if (!response.ok) throw await explain(response);
  const found = await response.json();
  token = found.token;
  email = found.user.email;
}

async function logOut(options = {}) {
  const last = token && email && request("logout", { method: "POST", headers: bearer(), ...options });
  token = null;
  const response = await last;
  // What is over already (401) needs no log-out.
  if (response && !response.ok && response.status !== 401) throw await explain(response);
}

// The password in place -------------------------------------------------------

let renewal = null;

/** Asks for the password, once for all that wait for it; ApiError 401 if the visit ends instead. */
function renew() {
  renewal ??= new Promise((resolve, reject) => {
    const form = find("again").querySelector("form");
    const problem = form.querySelector(".error");
    const over = new AbortController();
    const leave = (settle) => {
      over.abort();
      renewal = null;
      form.elements.password.value = "";
      find("again").close();
      settle();
    };
    const leaveAll = () => leave(() => reject(new ApiError(401, "")));
    problem.textContent = "";
    form.elements.email.value = email;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      problem.textContent = "";
      await logIn(form).then(() => leave(resolve), (error) => (problem.textContent = error.message));
      find("who").textContent = email;
    }, { signal: over.signal });
    find("leave").addEventListener("click", leaveAll, { signal: over.signal });
    find("again").addEventListener("cancel", (event) => event.preventDefault() ?? leaveAll(), { signal: over.signal }); // Escape
    find("again").showModal();
    form.elements[email ? "password" : "email"].focus();
  });
  return renewal;
}

// A visit ---------------------------------------------------------------------

function show(name) {
  find("login").hidden = Boolean(name);
  find("session").hidden = !name;
  find("who").textContent = name;
  find("login").elements.password.value = "";
}

/** Back to the form, with a reason, and to the field where it goes on. */
export function end(reason = "", field = "email") {
  closed();
  token = null;
  show("");
  find("login-error").textContent = reason;
  find("login").elements[field].focus();
}

/** Makes a token that was pasted the page's. */
export function adopt(pasted) {
  [token, email] = [pasted, ""];
  show("a token of your own");
}

const OURS = new Set(["docs", "usage"].map((name) => new URL(name, location).pathname));
let handing = false;

function handOver(url) {
  const { origin, pathname } = new URL(url, location);
  handing = Boolean(token) && origin === location.origin && OURS.has(pathname);
  if (handing) sessionStorage.setItem(HANDED, JSON.stringify({ token, email, at: Date.now() }));
}

function takeOver() {
  const handed = JSON.parse(sessionStorage.getItem(HANDED));
  sessionStorage.removeItem(HANDED);
  if (!handed) return false;
  ({ token, email } = handed);
  if (Date.now() - handed.at < HANDED_SECONDS * 1000) return true;
  logOut().catch(() => {});
  return false;
}

function followTheWay() {
  if ("navigation" in window) {
    navigation.addEventListener("navigate", ({ destination }) => destination.sameDocument || handOver(destination.url));
    navigation.addEventListener("navigateerror", () => {
      handing = false;
      sessionStorage.removeItem(HANDED);
    });
  } else {
    document.querySelector("nav").addEventListener("click", (event) => {
      const plain = !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);
      if (plain && event.target.href) handOver(event.target.href);
    });
  }
  addEventListener("pagehide", () => {
    if (!handing) logOut({ keepalive: true }).catch(() => {});
    token = null;
  });
  // Shown again out of the browser's memory: start again.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

/** Makes the form #login and the button #logout work; opened begins a visit, ended is told of its end. */
export function connect(opened, ended) {
  closed = ended;
  const handed = takeOver();
  followTheWay();
  find("login").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = find("login").querySelector(".primary");
    button.disabled = true;
    find("login-error").textContent = "";
    try {
      await logIn(find("login"));
    } catch (error) {
      return end(error.message, "password");
    } finally {
      button.disabled = false;
    }
    show(email);
    await opened();
  });
  find("logout").addEventListener("click", async () => {
    closed();
    const problem = await logOut().then(() => "", (error) => error.message);
    end(problem && `You are logged out here, but the service was not told, so the token stays valid: ${problem}`);
  });
  if (!handed) return;
  show(email || "a token of your own");
  opened();
}
