// The calls of a domain that ended in a month, in Google Sheets: Extensions, Apps Script,
// paste this, and run month. Keep the token under Project Settings, Script Properties,
// as CDR_TOKEN, with CDR_URL, CDR_DOMAIN and CDR_MONTH (2026-01) beside it.
//
// The sheet changes only when every page came whole, and calls and seconds are those
// that call_totals counts. Google's time for a script, 6 minutes, is the limit.
const FIELDS = "xml_cdr_uuid,start_stamp,end_stamp,direction,accountcode,caller_id_number,destination_number,billsec";

function month() {
  const { CDR_URL: api, CDR_TOKEN: token, CDR_DOMAIN: domain, CDR_MONTH: month } =
    PropertiesService.getScriptProperties().getProperties();
  const [year, number] = month.split("-").map(Number);
  const days = new Date(Date.UTC(year, number, 0)).getUTCDate();
  const range = `domain_name=${encodeURIComponent(domain)}&from=${month}-01&to=${month}-${days}&billable_only=true`;

  const calls = [];
  let url = `${api}/call_range?${range}&fields=${FIELDS}&limit=2000`;
  while (url) {
    const [page, next] = ask(url, token);
    calls.push(...page);
    if (next && !next.startsWith(`${api}/`)) throw new Error(`The next page is elsewhere, at ${next}.`);
    url = next;
  }
  const [[total]] = ask(`${api}/call_totals?${range}`, token);
  const seconds = calls.reduce((sum, call) => sum + call.billsec, 0);
  if (calls.length !== total.calls || seconds !== total.billsec) {
    throw new Error("The calls are not those that call_totals counts: run this again.");
  }
  write(calls.map((call) => Object.values(call)));
}

// An answer, and the URL of the next page or undefined; waits while the service is busy.
function ask(url, token) {
  const options = { headers: { Authorization: `Bearer ${token}` }, muteHttpExceptions: true, followRedirects: false };
  for (let attempt = 0; attempt < 5; attempt++) {
    const answer = UrlFetchApp.fetch(url, options);
    const headers = answer.getAllHeaders();
    const header = (name) => headers[Object.keys(headers).find((key) => key.toLowerCase() === name)];
    if (answer.getResponseCode() === 200) {
      // JSON that broke off has no closing bracket, so it is an error.
      return [JSON.parse(answer.getContentText("UTF-8")), header("link")?.match(/^<(.+)>; rel="next"/)?.[1]];
    }
    if (![429, 503].includes(answer.getResponseCode())) throw new Error(answer.getContentText());
    Utilities.sleep(Number(header("retry-after") ?? 30) * 1000);
  }
  throw new Error("The service is busy: try again later.");
}

// An apostrophe makes a cell text: no formula runs, and 0301234 keeps its zero. Seconds stay numbers.
function write(rows) {
  const cells = rows.map((row) => row.map((value) => (typeof value === "string" ? `'${value}` : value)));
  const sheet = SpreadsheetApp.getActive().getSheetByName("calls") ?? SpreadsheetApp.getActive().insertSheet("calls");
  sheet.clearContents();
  sheet.getRange(1, 1, cells.length + 1, FIELDS.split(",").length).setValues([FIELDS.split(","), ...cells]);
}
