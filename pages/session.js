// Logging in and out, and asking the API, for both pages.
//
// The token is kept in this variable and nowhere else. localStorage and sessionStorage belong to the whole origin, and
// behind FusionPBX's own nginx that is FusionPBX's origin too: a script in one of its pages could read a token there.
// So a reload asks for the password again (a password manager fills it in), and leaving the page logs out.
let token = null;

/** An answer that is not 2xx; the message is the service's own sentence. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  // Without FusionPBX's cookies, and never to another place.
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ message: `The service answered ${response.status}.` }));
  throw new ApiError(response.status, problem.message);
}

function ask(path, parameters, signal) {
  return send(`${path}?${new URLSearchParams(parameters)}`, { signal });
}

export async function readJson(path, parameters = {}, signal) {
  return (await ask(path, parameters, signal)).json();
}

/** The objects of an NDJSON answer in batches, as they arrive. Throws when the answer breaks off. */
export async function* readBatches(path, parameters, signal) {
  const response = await ask(path, { ...parameters, format: "ndjson" }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done && rest) throw new Error("its last line is not whole");
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield lines.map((line) => JSON.parse(line));
  }
}

async function logOut(options = {}) {
  const last = token && send("logout", { method: "POST", ...options });
  token = null;
  await last;
}

const find = (id) => document.getElementById(id);

function show(name) {
  find("login").hidden = Boolean(name);
  find("session").hidden = !name;
  find("who").textContent = name;
  find("login").elements.password.value = "";
}

/** Back to the form, with a reason. */
export function end(reason = "") {
  token = null;
  show("");
  find("login-error").textContent = reason;
  find("login").elements.email.focus();
}

/** Makes the form #login and the button #logout work; opened gets each new token, closed is told of its end. */
export function connect(opened, closed) {
  find("login").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = find("login").querySelector("button");
    button.disabled = true;
    find("login-error").textContent = "";
    try {
      const response = await send("login", { method: "POST", body: new URLSearchParams(new FormData(find("login"))) });
      const found = await response.json();
      token = found.token;
      show(found.user.email);
      await opened(token);
    } catch (error) {
      closed();
      await logOut().catch(() => {});
      end(error.message);
    } finally {
      button.disabled = false;
    }
  });
  find("logout").addEventListener("click", async () => {
    closed();
    // What is over already (401) needs no log-out.
    end(await logOut().then(() => "", (error) => (error.status === 401 ? "" : `Not logged out: ${error.message}`)));
  });
  addEventListener("pagehide", () => logOut({ keepalive: true }).catch(() => {}));
  // Shown again out of the browser's memory: logged out, so start again.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
