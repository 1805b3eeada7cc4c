// Numbers and dates as the browser's language writes them, for both pages: one locale for everything.
export const locale = isLanguage(navigator.language) ? navigator.language : undefined; // Intl's own, then

/** Not so is C, which WebKit takes from a system that has no language. */
function isLanguage(name) {
  try {
    return Intl.getCanonicalLocales(name).length > 0;
  } catch {
    return false;
  }
}

const format = (options) => new Intl.NumberFormat(locale, options);
const wholes = format({ maximumFractionDigits: 0 });
const tenths = format({ minimumFractionDigits: 1, maximumFractionDigits: 1 });
const percents = format({ style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const changes = format({ style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1, signDisplay: "exceptZero" });

export const whole = (number) => wholes.format(number);
export const minutes = (seconds) => tenths.format(Math.round(seconds / 6) / 10); // halves are exact only so
export const percent = (part, total) => (total ? percents.format(part / total) : "–");
export const change = (now, before) => (before ? changes.format(now / before - 1) : now ? "new" : "–");
export const count = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;

// Days are dates without a zone: read and written as UTC, they stay what they are.
const dates = (options) => new Intl.DateTimeFormat(locale, { ...options, timeZone: "UTC" });
const asDate = (options, text) => dates(options).format(new Date(text));
export const monthName = (month) => asDate({ month: "long", year: "numeric" }, `${month}-01T00:00Z`);
export const dayName = (day) => asDate({ day: "numeric", month: "long" }, `${day}T00:00Z`);
export const weekday = (day) => asDate({ weekday: "short", day: "numeric", month: "short" }, `${day}T00:00Z`); // without the month English has "1 Sun"
/** From one stamp to another, in the zone that they are written in. Where a clock is put back, the second may look earlier. */
export function between(...stamps) {
  const [start, stop] = stamps.map((stamp) => new Date(`${stamp.slice(0, 16)}Z`));
  return dates({ day: "numeric", month: "long", hour: "2-digit", minute: "2-digit" }).formatRange(start, stop < start ? start : stop);
}

/** How a zone is called: PostgreSQL has Etc/UTC, people do not. */
export const zoneName = (zone) => (zone === "Etc/UTC" ? "UTC" : zone);

/** The days of a month, as 2026-01-31. */
export function daysOf(month) {
  const [year, number] = month.split("-").map(Number);
  const last = new Date(Date.UTC(year, number, 0)).getUTCDate();
  return Array.from({ length: last }, (_, index) => `${month}-${String(index + 1).padStart(2, "0")}`);
}

export function addMonths(month, months) {
  const [year, number] = month.split("-").map(Number);
  return new Date(Date.UTC(year, number - 1 + months)).toISOString().slice(0, 7);
}

/** Today in a zone, as 2026-01-31; in the browser's if that does not know the zone. */
export function today(zone) {
  const write = (timeZone) => new Intl.DateTimeFormat("sv-SE", { timeZone, dateStyle: "short" }).format(new Date());
  try {
    return write(zone || undefined);
  } catch {
    return write();
  }
}
