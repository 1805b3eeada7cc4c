// Tables and calls as CSV files.
import { count, whole } from "./format.js";
import { ApiError, readBytes, readJson } from "./session.js";

const LINE_END = 10, QUOTE = 34;
const BOM = "\ufeff"; // by which Excel knows UTF-8

// As csv_safe does it: a spreadsheet would run such text as a formula.
const cell = (value) => {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r\n]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) || value === "" ? `"${text.replaceAll('"', '""')}"` : text;
};

const fileName = (parts) => `${parts.filter(Boolean).join(" ").replaceAll("/", "-").replace(/[^\p{L}\p{N}.-]+/gu, "_")}.csv`;

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Rows of cells as a file. Numbers are written for programs: whole, without separators. */
export function saveTable(parts, rows) {
  const text = rows.map((cells) => `${cells.map(cell).join(",")}\n`).join("");
  download(new Blob([BOM, text], { type: "text/csv" }), fileName(parts));
}

/**
 * Where a file's bytes go. Browsers that can write to a file that the user chose (Chromium) put it in place only when
 * it is closed; others collect it, and get it when it is whole. null if the user chose none.
 */
async function openTarget(name) {
  if (!window.showSaveFilePicker) {
    const parts = [];
    return { write: (bytes) => parts.push(bytes), close: () => download(new Blob(parts, { type: "text/csv" }), name), abort() {} };
  }
  const types = [{ description: "CSV", accept: { "text/csv": [".csv"] } }];
  const handle = await showSaveFilePicker({ suggestedName: name, types }).catch((error) => {
    if (error.name === "AbortError") return null;
    throw error;
  });
  return handle && handle.createWritable();
}

async function countCalls(parameters, signal) {
  const [{ calls }] = await readJson("call_totals", parameters, signal);
  return calls;
}

/** Writes what call_range answers to a target, behind a BOM; gives the number of calls. */
async function copyCalls(target, parameters, signal, progress) {
  let lines = 0, quoted = false;
  await target.write(BOM);
  for await (const bytes of readBytes("call_range", parameters, signal)) {
    for (const byte of bytes) {
      if (byte === QUOTE) quoted = !quoted;
      else if (byte === LINE_END && !quoted) lines += 1;
    }
    await target.write(bytes);
    progress(lines - 1);
  }
  return lines - 1; // the first names the fields
}

/**
 * The calls of a range as a file: first counted, then streamed, and kept only if as many came. Where calls are stored
 * in between there are more at the end than at the beginning, and the file has a number between the two.
 */
export async function saveCalls(job, parts, range, fields) {
  const name = fileName(["calls", ...parts]);
  const target = await openTarget(name);
  if (!target) return;
  let said = "";
  // A file is chosen by the click, so that Try again has to ask for it again.
  const done = await job.run(`Saving ${name} …`, () => saveCalls(job, parts, range, fields), async (signal) => {
    try {
      const before = await countCalls(range, signal);
      const parameters = { ...range, fields, format: "csv", csv_safe: "true" };
      const found = await copyCalls(target, parameters, signal, (calls) =>
        job.progress(calls, before, `${whole(calls)} of ${count(before, "call")}`));
      const after = found === before ? before : await countCalls(range, signal);
      if (found < before || found > after) {
        throw new ApiError(0, `The file was thrown away: ${count(found, "call")} came, but there are ${whole(after)}.`);
      }
      await target.close();
      said = `Saved ${name}: ${count(found, "call")}, complete. Import it into a spreadsheet with its columns as text:`
        + " opened with a double click, telephone numbers lose their zeros.";
    } catch (error) {
      await target.abort();
      throw error.status === 0 ? new ApiError(0, `${error.message} No file was saved.`) : error;
    }
  });
  if (done) job.say(said);
}
