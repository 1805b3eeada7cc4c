#!/usr/bin/env node
// The calls of a domain that ended in a month, one JSON object a line:
//
//     export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
//     node month.mjs alpha.example.com 2026-01 calls.ndjson
//
// The file is there whole or not at all: every page came to its end, and calls and
// seconds are those that call_totals counts. Needs Node 18 or newer.
import { appendFile, rename, rm, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

const FIELDS = "xml_cdr_uuid,start_stamp,end_stamp,direction,accountcode,caller_id_number,destination_number,billsec";
const { CDR_URL: api, CDR_TOKEN: token } = process.env;

// An answer's pages; waits while the service is busy.
async function* ask(route, query) {
  let [url, tries] = [`${api}/${route}?${new URLSearchParams(query)}`, 10];
  while (url) {
    if (!url.startsWith(`${api}/`)) throw new Error(`The next page is elsewhere, at ${url}: is CDR_API_PROXIES right?`);
    const answer = await fetch(url, { headers: { Authorization: `Bearer ${token}` }, redirect: "error" });
    const text = await answer.text(); // fails if the answer broke off
    if (answer.status === 200) {
      yield JSON.parse(text);
      url = answer.headers.get("Link")?.match(/^<(.+)>; rel="next"/)?.[1];
    } else if ([429, 503].includes(answer.status) && --tries) {
      const seconds = Number(answer.headers.get("Retry-After") ?? 30);
      console.error(`${answer.status}: waiting ${seconds} s.`);
      await sleep(seconds * 1000);
    } else {
      throw new Error(`${answer.status}: ${text}`);
    }
  }
}

async function saveMonth(domain, month, file) {
  const [year, number] = month.split("-").map(Number);
  const days = new Date(Date.UTC(year, number, 0)).getUTCDate();
  const query = { domain_name: domain, from: `${month}-01`, to: `${month}-${days}`, billable_only: "true" };
  const part = `${file}.${process.pid}`;
  let [count, seconds] = [0, 0];
  try {
    await writeFile(part, "", { flag: "wx" });
    for await (const calls of ask("call_range", { ...query, fields: FIELDS, limit: 10000 })) {
      await appendFile(part, calls.map((call) => `${JSON.stringify(call)}\n`).join(""));
      count += calls.length;
      seconds += calls.reduce((sum, call) => sum + call.billsec, 0);
    }
    const [total] = (await ask("call_totals", query).next()).value;
    if (count !== total.calls || seconds !== total.billsec) {
      throw new Error(`Read ${count} calls, ${seconds} seconds, but there are others now: run this again.`);
    }
    await rename(part, file);
  } finally {
    await rm(part, { force: true });
  }
  return `${count} calls, ${seconds} seconds`;
}

if (!api || !token || process.argv.length !== 5) {
  console.error("usage: CDR_URL=… CDR_TOKEN=… node month.mjs DOMAIN YYYY-MM FILE");
  process.exit(1);
}
try {
  console.log(await saveMonth(...process.argv.slice(2)));
} catch (error) {
  console.error(`Nothing is kept: ${error.message} ${error.cause ?? ""}`);
  process.exitCode = 1;
}
