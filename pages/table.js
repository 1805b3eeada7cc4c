// A table whose columns are described once: head, cells, foot, order and CSV come from that.

/** A column is { name, head, csv, value(row), text(row), foot(rows) }: text is shown; value sorts, and goes into a file below csv. */
export function fillHead(table, columns, sort) {
  table.tHead.rows[0].replaceChildren(...columns.map((column) => {
    const cell = Object.assign(document.createElement("th"), { scope: "col" });
    if (!sort) return Object.assign(cell, { textContent: column.head });
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: column.head });
    button.addEventListener("click", () => sort.by(column));
    if (sort.name === column.name) cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
    cell.append(button);
    return cell;
  }));
}

function fillRow(row, [head, ...cells]) {
  const first = Object.assign(document.createElement("th"), { scope: "row" });
  first.append(head);
  row.append(first);
  for (const content of cells) row.insertCell().append(content);
  return row;
}

export function fillRows(part, rows) {
  part.replaceChildren();
  return rows.map((cells) => fillRow(part.insertRow(), cells));
}

/** What goes into a file: the columns that have a name there. */
export function fileRows(columns, rows) {
  const kept = columns.filter((column) => column.csv);
  return [kept.map((column) => column.csv), ...rows.map((row) => kept.map((column) => column.value(row)))];
}

export const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

/** A link, whose text may be broken after its dots, as names of domains are. */
export function makeLink(text, href) {
  const link = Object.assign(document.createElement("a"), { href });
  link.append(...text.split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]));
  return link;
}

export const PEAK = "Peak of\u00a0calls at\u00a0once"; // the head of a column, in three lines at most
