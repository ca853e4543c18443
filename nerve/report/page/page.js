"use strict";
// Lets tables be sorted and filtered. Their rows stay the elements that they are.

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function valueOf(cell) {
  if (cell.className === "missing") return null;
  return cell.className === "number" ? Number(cell.dataset.value) : cell.textContent;
}

// "<3.5", ">=2" and "=4" compare numbers; anything else is looked for in the text of the cell.
function matcher(wanted) {
  const comparison = wanted.match(/^\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[-+]?\d+)?)\s*$/i);
  if (!comparison) {
    const text = wanted.trim().toLowerCase();
    return (value, shown) => shown.toLowerCase().includes(text);
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

function enliven(part) {
  const body = part.querySelector("tbody");
  const count = part.querySelector(".count");
  const titles = part.querySelector("thead tr");
  const all = [...body.rows].map((line) => ({
    line,
    values: [...line.cells].map(valueOf),
    texts: [...line.cells].map((cell) => cell.textContent),
  }));
  const filters = [...titles.cells].map(() => "");
  let sorted = -1;
  let sign = 1;

  function update() {
    const wanted = filters.map((text) => (text.trim() ? matcher(text) : null));
    const rows = all.filter((row) =>
      wanted.every((test, i) => !test || test(row.values[i], row.texts[i])),
    );
    if (sorted >= 0) rows.sort((a, b) => compare(a.values[sorted], b.values[sorted], sign));
    body.replaceChildren(...rows.map((row) => row.line));
    count.textContent = `${rows.length} of ${all.length} rows`;
  }

  const inputs = element("tr");
  [...titles.cells].forEach((title, i) => {
    const name = title.textContent;
    const button = element("button", name, { type: "button" });
    button.addEventListener("click", () => {
      sign = sorted === i ? -sign : 1;
      sorted = i;
      for (const other of titles.cells) other.setAttribute("aria-sort", "none");
      title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      update();
    });
    title.setAttribute("aria-sort", "none");
    title.replaceChildren(button);
    const input = element("input", undefined, { type: "search", "aria-label": `filter ${name}` });
    input.addEventListener("input", () => {
      filters[i] = input.value;
      update();
    });
    const holder = element("th");
    holder.append(input);
    inputs.append(holder);
  });
  titles.after(inputs);
  update();
}

for (const body of document.querySelectorAll("tbody")) enliven(body.closest("section"));
