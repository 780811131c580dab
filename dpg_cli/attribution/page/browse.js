"use strict";
// The page of an attribution. Its data lies packed in blocks that are opened when they are looked at; all text of the user's
// reaches the page through textContent.
(async function () {
  const byId = (id) => document.getElementById(id);
  const opened = new Map();

  async function bytes(name) {
    const block = byId("b-" + name);
    const packed = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }
  function open(name, read) {
    if (!opened.has(name)) opened.set(name, bytes(name).then(read));
    return opened.get(name);
  }
  const json = (name) => open(name, (data) => JSON.parse(new TextDecoder().decode(data)));

  const about = await json("about");
  const count = about.count;
  const numbers = await open("ids", (data) => (data.byteLength === 8 * count ? new Float64Array(data) : new Int32Array(data)));
  const stands = await open("stands", (data) => new Int32Array(data));
  const state = { query: 0, page: { helpful: 0, harmful: 0 }, found: null, sought: 0, side: "helpful" };
  const ordered = new Map(); // rows of a query by score, highest first

  const minus = (text) => text.replace(/-/g, "\u2212");
  const number = (value) => {
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return minus(value.toExponential(2));
    return minus(Number(value.toPrecision(4)).toString());
  };
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const drawn = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  const scoresOf = (query) => open("scores-" + query, (data) => new Float32Array(data));
  async function orderOf(query) {
    if (!ordered.has(query)) {
      const scores = await scoresOf(query);
      const rows = Uint32Array.from({ length: count }, (_, row) => row);
      ordered.set(query, rows.sort((one, other) => scores[other] - scores[one] || one - other));
    }
    return ordered.get(query);
  }
  async function textOf(row) {
    const block = Math.floor(row / about.texts);
    return (await json("texts-" + block))[row - block * about.texts];
  }

  // ---- pictures

  function frame(place, width, height) {
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    byId(place).replaceChildren(svg);
    return svg;
  }
  function tick(svg, x, y, text, anchor) {
    const made = drawn("text", { x, y, class: "tick", "text-anchor": anchor });
    made.textContent = text;
    svg.append(made);
  }

  function histogram(scores, order) {
    const [width, height, foot, bins] = [480, 190, 22, 60];
    const svg = frame("histogram", width, height);
    const edge = Math.max(Math.abs(scores[order[0]]), Math.abs(scores[order[count - 1]]));
    const counts = new Array(bins).fill(0);
    if (edge > 0) for (const score of scores) counts[Math.min(bins - 1, Math.floor(((score / edge + 1) / 2) * bins))] += 1;
    const tallest = Math.log1p(Math.max(1, ...counts));
    counts.forEach((many, bin) => {
      const tall = ((height - foot - 14) * Math.log1p(many)) / tallest;
      const bar = drawn("rect", {
        x: (bin * width) / bins + 0.5, y: height - foot - tall, width: width / bins - 1, height: tall,
        class: bin < bins / 2 ? "bar-n" : "bar-p",
      });
      const said = drawn("title", {});
      said.textContent = `${many} examples from ${number(((2 * bin) / bins - 1) * edge)} to ${number(((2 * bin + 2) / bins - 1) * edge)}`;
      bar.append(said);
      svg.append(bar);
    });
    svg.append(drawn("line", { x1: 0, x2: width, y1: height - foot, y2: height - foot, class: "grid" }));
    tick(svg, 0, height - 6, number(-edge), "start");
    tick(svg, width / 2, height - 6, "0", "middle");
    tick(svg, width, height - 6, number(edge), "end");
  }

  function sums(scores, order) {
    // predicted change of Phi when the first k of an order are left out: minus the sum of their scores
    const run = (rows) => {
      const made = new Float64Array(count + 1);
      for (let k = 0; k < count; k++) made[k + 1] = made[k] - scores[rows(k)];
      return made;
    };
    return { helpful: run((k) => order[k]), harmful: run((k) => order[count - 1 - k]) };
  }

  function cumulative(both, top) {
    const [width, height, foot] = [480, 190, 22];
    const svg = frame("cumulative", width, height);
    const last = Math.min(count, Math.max(20, 4 * top));
    const values = [...both.helpful.slice(0, last + 1), ...both.harmful.slice(0, last + 1)];
    const high = Math.max(0, ...values), low = Math.min(0, ...values), span = high - low || 1;
    const y = (value) => 8 + ((high - value) / span) * (height - foot - 16);
    svg.append(drawn("line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "grid" }));
    for (const [side, kind] of [["helpful", "curve-p"], ["harmful", "curve-n"]]) {
      const step = Math.max(1, Math.floor(last / 480));
      const points = [];
      for (let k = 0; k <= last; k += step) points.push(`${((k / last) * width).toFixed(1)},${y(both[side][k]).toFixed(1)}`);
      svg.append(drawn("polyline", { points: points.join(" "), class: kind }));
    }
    const x = (Math.min(top, last) / last) * width;
    svg.append(drawn("line", { x1: x, x2: x, y1: 0, y2: height - foot, class: "mark" }));
    tick(svg, 0, height - 6, "0", "start");
    tick(svg, width, height - 6, last.toLocaleString("en") + " examples", "end");
    tick(svg, 4, 14, signed(high), "start");
    tick(svg, 4, height - foot - 6, signed(low), "start");
  }

  function scatter(found) {
    if (!byId("scatter")) return;
    if (!found) {
      byId("scatter").replaceChildren();
      byId("trust").textContent = "Not validated by retraining.";
      return;
    }
    const [width, height, foot] = [480, 190, 22];
    const svg = frame("scatter", width, height);
    const edge = Math.max(...found.points.flat().map(Math.abs)) || 1;
    const x = (value) => ((value / edge + 1) / 2) * (width - 16) + 8;
    const y = (value) => ((1 - value / edge) / 2) * (height - foot - 16) + 8;
    svg.append(drawn("line", { x1: x(-edge), x2: x(edge), y1: y(0), y2: y(0), class: "grid" }));
    svg.append(drawn("line", { x1: x(0), x2: x(0), y1: y(-edge), y2: y(edge), class: "grid" }));
    svg.append(drawn("line", { x1: x(-edge), x2: x(edge), y1: y(-edge), y2: y(edge), class: "reference" }));
    for (const [one, other] of found.points) {
      const dot = drawn("circle", { cx: x(one).toFixed(1), cy: y(other).toFixed(1), r: 3.5, class: "dot" });
      const said = drawn("title", {});
      said.textContent = `predicted ${signed(one)}, measured ${signed(other)}`;
      dot.append(said);
      svg.append(dot);
    }
    tick(svg, 4, height - 6, "predicted " + signed(-edge), "start");
    tick(svg, width - 4, height - 6, signed(edge), "end");
    tick(svg, x(0) + 6, 14, "measured", "start");
    byId("trust").textContent =
      `Changes of \u03a6 in ${found.points.length} retrainings, each without a random ${Math.round(100 * found.share)} % of the ` +
      `examples. Rank correlation (LDS) ${found.lds.toFixed(3)}, 95 %: ${found.low.toFixed(3)} to ${found.high.toFixed(3)}.`;
  }

  let totals = null;
  function predict() {
    const top = Math.min(count, Math.max(1, Math.floor(Number(byId("top").value)) || 1));
    cumulative(totals, top);
    const what = top === 1 ? "example" : `${top.toLocaleString("en")} examples`;
    byId("predicted").textContent =
      `Without the most harmful ${what}, \u03a6 changes by ${signed(totals.harmful[top])}; ` +
      `without the most helpful, by ${signed(totals.helpful[top])} (predicted, to first order).`;
  }

  // ---- examples

  async function side(name) {
    const scores = await scoresOf(state.query), order = await orderOf(state.query);
    const up = name === "helpful";
    const kept = byId("fold").value === "yes", sign = byId("sign").value;
    const again = new Map();
    const rows = [];
    for (let k = 0; k < count; k++) {
      const row = order[up ? k : count - 1 - k];
      if (up ? scores[row] < 0 : scores[row] >= 0) break;
      if (state.found && !state.found.has(row)) continue;
      if ((sign === "p" && !(scores[row] > 0)) || (sign === "n" && !(scores[row] < 0))) continue;
      const stand = stands[row];
      again.set(stand, (again.get(stand) || 0) + 1);
      if (!kept || again.get(stand) === 1) rows.push({ row, rank: k + 1, stand });
    }
    return { rows, again, scores };
  }

  async function item({ row, rank, stand }, { again, scores }) {
    const made = element("li");
    made.tabIndex = -1;
    const meta = element("p", "meta");
    meta.append(element("span", "score", signed(scores[row])), ` \u00b7 rank ${rank.toLocaleString("en")} \u00b7 `);
    const named = `row ${numbers[row]}`;
    if (about.href) {
      const link = element("a", "", `${named} of ${about.source}`);
      link.href = about.href;
      meta.append(link);
    } else meta.append(named);
    const times = again.get(stand);
    if (byId("fold").value === "yes" && times > 1) meta.append(element("span", "again", ` \u00b7 and ${times - 1} more like it`));
    made.append(meta);
    const text = element("p", "text");
    const pieces = (await json("tokens-" + state.query))[row];
    if (pieces && pieces.length) {
      for (const [piece, score, shade] of pieces) {
        const span = element("span", shade === 0 ? "z" : (shade > 0 ? "p" : "n") + Math.abs(shade), piece);
        span.title = number(score);
        text.append(span);
      }
    } else text.textContent = await textOf(row);
    made.append(text);
    return made;
  }

  let turn = 0;
  async function show() {
    const mine = ++turn; // a later call overtakes this one
    for (const name of ["helpful", "harmful"]) {
      const found = await side(name);
      const pages = Math.max(1, Math.ceil(found.rows.length / about.perPage));
      const page = (state.page[name] = Math.min(Math.max(state.page[name], 0), pages - 1));
      const shown = found.rows.slice(page * about.perPage, (page + 1) * about.perPage);
      const items = await Promise.all(shown.map((entry) => item(entry, found)));
      if (mine !== turn) return;
      byId(name).replaceChildren(...(items.length ? items : [element("li", "meta", "none")]));
      byId(name + "-position").textContent = `page ${page + 1} of ${pages.toLocaleString("en")}`;
      for (const button of document.querySelectorAll(`button[data-side=${name}]`))
        button.disabled = button.dataset.by === "-1" ? page === 0 : page === pages - 1;
    }
    const many = state.found ? state.found.size : count;
    byId("status").textContent =
      state.sought < count && state.found ? `${many.toLocaleString("en")} found so far` : `${many.toLocaleString("en")} examples`;
    document.body.dataset.ready = String(mine);
  }

  let searching = 0;
  async function search() {
    const mine = ++searching;
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    state.page = { helpful: 0, harmful: 0 };
    if (!words.length) {
      state.found = null;
      return show();
    }
    state.found = new Set();
    state.sought = 0;
    let shown = performance.now();
    for (let start = 0; start < count; start += about.texts) {
      const texts = await json("texts-" + start / about.texts);
      if (mine !== searching) return;
      texts.forEach((text, at) => {
        const low = text.toLowerCase();
        if (words.every((word) => low.includes(word))) state.found.add(start + at);
      });
      state.sought = start + texts.length;
      if (performance.now() - shown > 400) {
        await show();
        shown = performance.now();
      }
    }
    return show();
  }

  async function ask(query) {
    state.query = query;
    state.page = { helpful: 0, harmful: 0 };
    for (const button of document.querySelectorAll("#queries button"))
      button.setAttribute("aria-selected", String(Number(button.dataset.query) === query));
    const { name, before, after, validation } = about.queries[query];
    byId("question").textContent = name;
    byId("change").textContent =
      before === null || after === null ? "" : `\u03a6 ${number(before)} before fine-tuning, ${number(after)} after`;
    const scores = await scoresOf(query), order = await orderOf(query);
    histogram(scores, order);
    totals = sums(scores, order);
    scatter(validation);
    predict();
    return show();
  }

  function move(by) {
    const items = [...document.querySelectorAll(`#${state.side} > li`)];
    const at = items.indexOf(document.activeElement);
    const next = items[Math.min(Math.max(at + by, 0), items.length - 1)];
    if (next) next.focus();
  }

  for (const form of ["controls", "removal"]) byId(form).addEventListener("submit", (event) => event.preventDefault());
  byId("queries").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) ask(Number(button.dataset.query));
  });
  byId("search").addEventListener("input", search);
  byId("sign").addEventListener("change", () => { state.page = { helpful: 0, harmful: 0 }; show(); });
  byId("fold").addEventListener("change", () => { state.page = { helpful: 0, harmful: 0 }; show(); });
  byId("top").addEventListener("input", predict);
  for (const button of document.querySelectorAll("button[data-side]"))
    button.addEventListener("click", () => {
      state.page[button.dataset.side] += Number(button.dataset.by);
      show();
    });
  document.addEventListener("focusin", (event) => {
    const list = event.target.closest("#helpful, #harmful");
    if (list) state.side = list.id;
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
    else if (event.key === "[" || event.key === "]") {
      const query = state.query + (event.key === "]" ? 1 : -1);
      if (query >= 0 && query < about.queries.length) ask(query);
    } else if (event.key === "/") byId("search").focus();
    else return;
    event.preventDefault();
  });
  await ask(0);
})();
