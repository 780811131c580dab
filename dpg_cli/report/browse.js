"use strict";
// The browser of the examples: search, order, pages. All text reaches the page through textContent.
(function () {
  const byId = (id) => document.getElementById(id);
  const list = byId("rows");
  if (!list) return;
  const { rows, perPage } = JSON.parse(byId("data").textContent);
  let page = 0;
  let found = [];

  const number = (value) => {
    if (value === null) return "";
    let text = Number(value.toPrecision(4)).toString();
    if (value !== 0 && Math.abs(value) < 1e-4) text = value.toExponential(3).replace(/\.?0+e/, "e");
    return text.replace("e+", "e").replace(/-/g, "\u2212");
  };
  const shade = (value) => (value === 0 ? "z" : (value > 0 ? "p" : "n") + Math.abs(value));
  const element = (name, className, text) => {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  for (const row of rows) {
    row.text = row.pieces.map((piece) => piece[0]).join("");
    row.sought = (row.text + "\n" + row.prompt).toLowerCase();
  }

  function item(row) {
    const made = element("li", "");
    let meta = "example " + row.number;
    if (row.reward !== null) meta += " \u00b7 reward " + number(row.reward) + " \u00b7 rank " + row.rank;
    made.append(element("p", "meta", meta));
    if (row.prompt) {
      const prompt = element("p", "prompt");
      prompt.append(element("span", "label", "Prompt"), " " + row.prompt);
      made.append(prompt);
    }
    const text = element("p", "text");
    for (const [piece, reward, colour] of row.pieces) {
      const span = element("span", shade(colour), piece);
      if (reward !== null) span.title = number(reward);
      text.append(span);
    }
    made.append(text);
    return made;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / perPage));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...found.slice(page * perPage, (page + 1) * perPage).map(item));
    byId("position").textContent = "page " + (page + 1) + " of " + pages;
    byId("status").textContent = found.length === 1 ? "1 example" : found.length + " examples";
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }

  function search() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const origin = byId("origin").value;
    found = rows.filter((row) => row.origin === origin && words.every((word) => row.sought.includes(word)));
    const order = byId("order").value;
    if (order === "low") found.sort((a, b) => a.reward - b.reward);
    if (order === "high") found.sort((a, b) => b.reward - a.reward);
    if (order === "number") found.sort((a, b) => a.number - b.number);
    page = 0;
    show();
  }

  function turn(by) {
    page += by;
    show();
    byId("status").scrollIntoView({ block: "nearest" });
  }

  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", search);
  byId("origin").addEventListener("change", search);
  byId("order").addEventListener("change", search);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  // A tap shows a token's reward where there is no pointer to hover with.
  list.addEventListener("click", (event) => {
    const title = event.target.title;
    if (title) byId("status").textContent = "\u201c" + event.target.textContent.trim() + "\u201d: reward " + title;
  });
  byId("controls").hidden = false;
  byId("pager").hidden = false;
  search();
})();
