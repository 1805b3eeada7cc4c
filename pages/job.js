// One thing that is read: what it is, how far it has come, a button that cancels it; what went wrong, and a button that
// tries again. To cancel is to close the connection, upon which the service cancels the statement.
import { ApiError, end } from "./session.js";

function make(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

export class Job {
  constructor(root) {
    this.root = root;
    this.status = make("p");
    this.status.setAttribute("role", "status");
    this.bar = make("progress");
    this.far = make("span", { className: "note" });
    this.far.setAttribute("aria-hidden", "true"); // else each step would be read out
    this.cancel = make("button", { type: "button", textContent: "Cancel" });
    this.problem = make("p", { className: "error" });
    this.problem.setAttribute("role", "alert");
    this.again = make("button", { type: "button", textContent: "Try again", className: "primary" });
    this.running = make("div", { className: "running" });
    this.running.append(this.bar, this.far, this.cancel);
    root.append(this.status, this.running, this.problem, this.again);
    this.cancel.addEventListener("click", () => this.controller?.abort());
    this.stop();
  }

  show({ said = "", running = false, problem = "", again = null }) {
    this.status.textContent = said;
    this.problem.textContent = problem;
    this.running.hidden = !running;
    this.again.hidden = !again;
    this.again.onclick = again;
  }

  /** Shows a sentence, and what may stand behind it. */
  say(sentence, ...more) {
    this.show({ said: sentence });
    this.status.append(...more);
  }

  /** Ends what runs, without a word. */
  stop() {
    const last = this.controller;
    this.controller = null;
    last?.abort();
    this.say("");
  }

  /** How far it is: of total, where that is known. */
  progress(done, total, text) {
    if (total) Object.assign(this.bar, { max: total, value: Math.min(done, total) });
    else this.bar.removeAttribute("value");
    this.far.textContent = text ?? "";
  }

  /** Runs work(signal); true if it came to its end. again is what Try again does after a failure. */
  async run(sentence, again, work) {
    this.stop();
    const controller = (this.controller = new AbortController());
    this.progress(0);
    this.bar.setAttribute("aria-label", sentence);
    this.show({ said: sentence, running: true });
    try {
      await work(controller.signal);
      if (controller !== this.controller) return false;
      this.controller = null;
      this.say("");
      return true;
    } catch (error) {
      if (controller !== this.controller) return false; // something else runs here by now
      const cancelled = controller.signal.aborted;
      this.stop(); // what else it asks for
      if (cancelled) this.show({ said: "Cancelled.", again });
      else if (error.status === 401) end();
      else if (error instanceof ApiError) this.show({ problem: error.message, again });
      else {
        this.show({ problem: `This page has a fault (${error.message}).`, again });
        throw error;
      }
      return false;
    }
  }
}
