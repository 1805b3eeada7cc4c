// A table whose columns are described once: head, cells, foot, order and CSV come from that.

/** A column is { name, head, value(row), text(row), foot(rows) }: text is shown; value sorts, and goes into a file. */
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

export const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

export function makeLink(text, href) {
  return Object.assign(document.createElement("a"), { textContent: text, href });
}
