"use strict";
// Builds the page from its data. Text is only ever set as text, never as markup.

const AT_ONCE = 200; // rows of a table that are shown before one asks for more

const data = JSON.parse(document.getElementById("data").textContent);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function fileLinks(folder, name, endings) {
  const line = element("span", "Files: ");
  for (const ending of endings) {
    const path = `${folder}/${encodeURIComponent(name)}.${ending}`;
    line.append(element("a", `${name}.${ending}`, { href: path }), " ");
  }
  return line;
}

function shown(value) {
  if (value === null) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 1e4) return value.toFixed(0);
  return size < 0.01 ? String(Number(value.toPrecision(4))) : value.toPrecision(4);
}

// "<3.5", ">=2" and "=4" compare numbers; anything else is looked for in the text of the cell.
function matcher(wanted) {
  const comparison = wanted.match(/^\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[-+]?\d+)?)\s*$/i);
  if (!comparison) {
    const text = wanted.trim().toLowerCase();
    return (value) => shown(value).toLowerCase().includes(text);
  }
  const limit = Number(comparison[2]);
  const holds = {
    "<": (value) => value < limit,
    ">": (value) => value > limit,
    "<=": (value) => value <= limit,
    ">=": (value) => value >= limit,
    "=": (value) => value === limit,
  }[comparison[1]];
  return (value) => typeof value === "number" && holds(value);
}

// Numbers by size, texts as people count (a2 before a10), missing ones last either way.
function compare(left, right, sign) {
  if (left === null || right === null) return (left === null) - (right === null);
  if (typeof left === "number" && typeof right === "number") return sign * (left - right);
  return sign * String(left).localeCompare(String(right), "en", { numeric: true });
}

function dataTable(table) {
  const count = element("p", "", { class: "count", "aria-live": "polite" });
  const more = element("button", "Show more rows", { class: "more", type: "button" });
  const head = element("thead");
  const body = element("tbody");
  const filters = table.columns.map(() => "");
  let sorted = -1;
  let sign = 1;
  let limit = AT_ONCE;

  function cell(value, column) {
    const made = element("td", shown(value));
    if (value === null) made.className = "missing";
    else if (typeof value === "number") made.className = "number";
    else if (table.columns[column] === "flag" && value !== "ok") made.className = "flagged";
    if (typeof value === "string") made.title = value;
    return made;
  }

  function update() {
    const wanted = filters.map((text) => (text.trim() ? matcher(text) : null));
    const rows = table.rows.filter((row) => wanted.every((test, i) => !test || test(row[i])));
    if (sorted >= 0) rows.sort((a, b) => compare(a[sorted], b[sorted], sign));
    body.replaceChildren(
      ...rows.slice(0, limit).map((row) => {
        const line = element("tr");
        line.append(...row.map(cell));
        return line;
      }),
    );
    const visible = Math.min(limit, rows.length);
    count.textContent =
      `${rows.length} of ${table.rows.length} rows` +
      (visible < rows.length ? `, the first ${visible} shown` : "");
    more.hidden = visible === rows.length;
  }

  const titles = element("tr");
  const inputs = element("tr");
  table.columns.forEach((name, i) => {
    const title = element("th", undefined, { scope: "col", "aria-sort": "none" });
    const button = element("button", name, { type: "button" });
    button.addEventListener("click", () => {
      sign = sorted === i ? -sign : 1;
      sorted = i;
      for (const other of titles.children) other.setAttribute("aria-sort", "none");
      title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      update();
    });
    title.append(button);
    titles.append(title);
    const input = element("input", undefined, { type: "search", "aria-label": `filter ${name}` });
    input.addEventListener("input", () => {
      filters[i] = input.value;
      limit = AT_ONCE;
      update();
    });
    const holder = element("th");
    holder.append(input);
    inputs.append(holder);
  });
  more.addEventListener("click", () => {
    limit += 5 * AT_ONCE;
    update();
  });
  head.append(titles, inputs);
  const grid = element("table");
  grid.append(head, body);
  const scroll = element("div", undefined, { class: "scroll", tabindex: "0" });
  scroll.append(grid);
  update();
  return [count, scroll, more];
}

function build() {
  document.title = data.title;
  document.getElementById("title").textContent = data.title;
  document.getElementById("made").textContent = data.made;

  const contents = document.getElementById("contents");
  for (const section of document.querySelectorAll("main > section")) {
    const hidden = section.id === "notes" && data.notes.length === 0;
    section.hidden = hidden;
    const name = section.querySelector("h2").textContent;
    if (!hidden) contents.append(element("a", name, { href: `#${section.id}` }));
  }
  const notes = document.querySelector("#notes ul");
  notes.append(...data.notes.map((note) => element("li", note)));
  const facts = document.querySelector("#facts dl");
  for (const [label, value] of data.facts) facts.append(element("dt", label), element("dd", value));

  const figures = document.getElementById("figures");
  if (data.figures.length === 0) figures.append(element("p", "There is nothing to draw."));
  for (const { name, caption, png } of data.figures) {
    const figure = element("figure", undefined, { id: `figure-${name}` });
    const source = `data:image/png;base64,${png}`;
    const text = element("figcaption", `${caption} `);
    text.append(fileLinks("figures", name, ["svg", "png"]));
    figure.append(element("img", undefined, { src: source, alt: caption }), text);
    figures.append(figure);
  }

  const tables = document.getElementById("tables");
  for (const table of data.tables) {
    const part = element("section", undefined, { id: `table-${table.name}` });
    const caption = element("p", `${table.caption} `, { class: "caption" });
    caption.append(fileLinks("tables", table.name, ["csv", "parquet"]));
    part.append(element("h3", table.name), caption);
    if (table.rows === null) {
      part.append(element("p", `${table.n_rows} rows, in the files only.`, { class: "count" }));
    } else {
      part.append(...dataTable(table));
    }
    tables.append(part);
  }
}

build();
