"use strict";
(() => {
  const FIRST = 25; // rows shown before all are asked for
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const table = document.getElementById("layer-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const search = document.getElementById("search");
  const branch = document.getElementById("branch");
  const state = document.getElementById("state");
  const count = document.getElementById("count");
  const more = document.createElement("button");
  let everything = false;
  let opened = null; // {row, inside}

  // ---- showing, sorting, opening rows

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of body.querySelectorAll("tr.layer")) {
      const d = row.dataset;
      const text = `${d.name} ${d.kind} ${d.state} ${d.why}`.toLowerCase();
      const fits = words.every((w) => text.includes(w)) && (!branch.value || d.branch === branch.value) && (!state.value || d.state === state.value);
      row.hidden = !fits;
      found += fits;
      row.classList.toggle("beyond", fits && !everything && found > FIRST);
      if (opened && opened.row === row && (!fits || row.classList.contains("beyond"))) close();
    }
    count.textContent = `${found} of ${rows.length} layers`;
    more.hidden = everything || found <= FIRST;
    more.textContent = `Show all ${found} layers`;
  }

  function sortBy(header) {
    const key = header.querySelector("button").dataset.sort;
    const before = header.getAttribute("aria-sort");
    const sign = before === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const numeric = !["name", "kind", "state"].includes(key);
    const value = (row) => (row.dataset[key] === "" ? null : numeric ? Number(row.dataset[key]) : row.dataset[key]);
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is unknown comes last
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
    if (opened) opened.row.after(opened.inside);
    show();
  }

  function close() {
    opened.row.classList.remove("opened");
    opened.row.querySelector(".open").setAttribute("aria-expanded", "false");
    opened.inside.remove();
    opened = null;
    for (const tile of document.querySelectorAll(".tile.picked")) tile.classList.remove("picked");
  }

  function open(row) {
    if (opened) close();
    const inside = document.createElement("tr");
    const cell = inside.insertCell();
    cell.className = "inside";
    cell.colSpan = row.cells.length;
    row.classList.add("opened");
    row.querySelector(".open").setAttribute("aria-expanded", "true");
    row.after(inside);
    opened = { row, inside };
    fill(cell, row.dataset);
    for (const tile of document.querySelectorAll("button.tile")) tile.classList.toggle("picked", tile.dataset.pick === row.dataset.name);
  }

  function pick(name) {
    const row = rows.find((one) => one.dataset.name === name);
    if (!row) return;
    if (row.hidden) search.value = branch.value = state.value = "";
    if (row.hidden || row.classList.contains("beyond")) {
      everything = true;
      show();
    }
    open(row);
    row.querySelector(".open").focus({ preventScroll: true });
    row.scrollIntoView({ block: "center" });
  }

  // ---- what a row holds when it is open

  const minus = (text) => text.replace("-", "\u2212");
  const show3 = (x) => minus(String(Number(Number(x).toPrecision(3))));
  const share = (x) => (x === 0 ? "0 %" : x < 1e-6 ? "< 0.0001 %" : `${show3(100 * x)} %`);
  const decibel = (x) => minus(`${(-10 * Math.log10(x)).toFixed(1)} dB`);

  function fill(cell, d) {
    const c = charts[d.quantizer];
    const facts = [
      ["State", d.state === "int8" ? "INT8" : "float"], ["Kind", d.kind], ["Weight shape", d.shape], ["Bits", d.bits], ["MACs a frame", d.macs && Number(d.macs).toLocaleString("en")],
      ["amax of the input", d.amax && show3(d.amax)], ["amax of the weight’s channels", d.weight],
    ];
    if (c) {
      facts.push(["Values seen", c.total.toLocaleString("en")], ["Largest", show3(c.max)], ["Least", show3(c.min)], ["Zeros", share(c.zeros / c.total)]);
      if (c.clipped != null) facts.push(["Clipped", share(c.clipped)], ["Rounded to zero", share(c.underflow)]);
      if (c.error != null) facts.push(["SQNR of the input", decibel(c.error)]);
    }
    facts.push(["Why it is float", d.why], ["One input scale with", d.shared]);
    const list = node("dl", { class: "facts" });
    for (const [term, text] of facts) if (text) list.append(node("div", text.length > 40 ? { class: "long" } : {}, node("dt", {}, term), node("dd", {}, text)));
    cell.append(list);
    if (!c || !c.counts.length) {
      cell.append(node("p", {}, c ? "Its input was zero everywhere." : "No statistics of its input are in this report."));
      return;
    }
    const box = node("div", { class: "charts" });
    W = Math.min(480, Math.max(280, cell.clientWidth - 12));
    cell.append(box);
    box.append(histogram(c), curve(c));
  }

  // ---- charts; both have |x| or amax on a logarithmic axis

  function node(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function svg(name, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  let W = 480; // a narrow screen gets narrower charts, so that their text stays as large
  const H = 220, LEFT = 62, RIGHT = 12, TOP = 22, BOTTOM = 36;

  function domain(c) {
    const high = Math.max(c.max, c.amax || 0) * 1.25;
    return [Math.max(c.max / 2 ** 16, Math.min(c.amax || c.max, c.max) / 2 ** 11), high];
  }

  function frame(c, [low, high], [bottom, top], label, tick, title) {
    const x = (v) => LEFT + (Math.log(v / low) / Math.log(high / low)) * (W - LEFT - RIGHT);
    const y = (v) => H - BOTTOM - (Math.log(Math.max(v, bottom) / bottom) / Math.log(top / bottom)) * (H - TOP - BOTTOM);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
    const decades = Math.round(Math.log10(top / bottom));
    const step = Math.max(1, Math.ceil(decades / 5));
    for (let e = Math.round(Math.log10(top)); e >= Math.log10(bottom) - 1e-9; e -= step) {
      const at = y(10 ** e);
      root.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: at, y2: at }), svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, tick(10 ** e)));
    }
    for (let e = Math.ceil(Math.log10(low)); 10 ** e <= high; e++) {
      root.append(svg("line", { class: "axis", x1: x(10 ** e), x2: x(10 ** e), y1: H - BOTTOM, y2: H - BOTTOM + 4 }), svg("text", { x: x(10 ** e), y: H - BOTTOM + 16, "text-anchor": "middle" }, e >= -3 && e <= 5 ? String(10 ** e).replace(/^(0\.0*1).*/, "$1") : `1e${e}`));
    }
    root.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
    root.append(svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 4, "text-anchor": "middle" }, label));
    return { root, x, y };
  }

  function zone(root, from, to, words) {
    if (to - from < 1) return;
    root.append(svg("rect", { class: "zone", x: from, width: to - from, y: TOP, height: H - TOP - BOTTOM }));
    if (to - from > 50) root.append(svg("text", { x: from + 4, y: TOP + 14 }, words));
  }

  function mark(root, x, amax) {
    const at = x(amax);
    root.append(svg("line", { class: "amax", x1: at, x2: at, y1: TOP - 4, y2: H - BOTTOM }));
    const right = at > W / 2;
    root.append(svg("text", { class: "strong", x: right ? Math.min(at + 4, W - RIGHT) : at, y: TOP - 8, "text-anchor": right ? "end" : "start" }, `amax ${show3(amax)}`));
  }

  function readout(root, [low, high], say, caption, rest) {
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    root.append(cursor);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const at = Math.min(Math.max(((event.clientX - box.left) / box.width) * W, LEFT), W - RIGHT);
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, at);
      cursor.setAttribute("visibility", "visible");
      caption.textContent = say(low * (high / low) ** ((at - LEFT) / (W - LEFT - RIGHT)));
    });
    root.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      caption.textContent = rest;
    });
  }

  function histogram(c) {
    const n = c.counts.length;
    const edge = (i) => c.max * 2 ** ((16 * (i - n)) / n);
    const tallest = Math.max(...c.counts) / c.total;
    const top = 10 ** Math.ceil(Math.log10(tallest));
    const least = Math.min(...c.counts.filter((v) => v > 0)) / c.total;
    const bottom = Math.max(10 ** Math.floor(Math.log10(least)), top * 1e-8);
    const range = domain(c);
    const rest = `Share of the values in each bin of |x|; both axes are logarithmic.`;
    const { root, x, y } = frame(c, range, [bottom, Math.max(top, bottom * 10)], "|x| of the input", share, "Histogram of the input with amax marked");
    if (c.amax) {
      zone(root, LEFT, Math.max(x(c.amax / c.levels / 2), LEFT), "becomes 0");
      zone(root, x(c.amax), W - RIGHT, "clipped");
    }
    let path = "";
    for (let i = 0; i < n; i++) {
      if (edge(i) < range[0] || !c.counts[i]) continue;
      const [a, b, t] = [x(edge(i)), x(edge(i + 1)), y(c.counts[i] / c.total)];
      path += `M${a.toFixed(1)} ${H - BOTTOM}V${t.toFixed(1)}H${b.toFixed(1)}V${H - BOTTOM}Z`;
    }
    root.append(svg("path", { class: "bars", d: path }));
    if (c.amax) mark(root, x, c.amax);
    const caption = node("figcaption", {}, rest);
    readout(root, range, (v) => {
      const i = Math.floor(n + (n / 16) * Math.log2(v / c.max));
      return i >= 0 && i < n ? `${show3(edge(i))} to ${show3(edge(i + 1))}: ${share(c.counts[i] / c.total)} of the values` : `${show3(v)}: beyond the largest value`;
    }, caption, rest);
    return node("figure", {}, node("h4", {}, "What reached it"), root, caption);
  }

  function curve(c) {
    const at = (i) => c.max * 2 ** (-i / 8);
    const range = domain(c);
    const values = c.errors.map((e, i) => [at(i), e]).filter(([v, e]) => v >= range[0] && e > 0);
    const best = values.reduce((a, b) => (b[1] < a[1] ? b : a), values[0]);
    const bottom = 10 ** Math.floor(Math.log10(Math.min(best[1], c.error || 1)));
    const { root, x, y } = frame(c, range, [bottom, 1], "amax", (v) => minus(v === 1 ? "1" : `1e${Math.round(Math.log10(v))}`), "Squared quantisation error over amax");
    root.append(svg("polyline", { class: "curve", points: values.map(([v, e]) => `${x(v).toFixed(1)},${y(e).toFixed(1)}`).join(" ") }));
    if (c.amax) {
      mark(root, x, c.amax);
      if (c.error) root.append(svg("circle", { class: "dot", cx: x(c.amax), cy: y(c.error), r: 4 }));
    }
    const rest = `Squared error over the sum of squares; least near amax ${show3(best[0])} (${decibel(best[1])}).`;
    const caption = node("figcaption", {}, rest);
    readout(root, range, (v) => {
      const i = Math.round(8 * Math.log2(c.max / v));
      return i >= 0 && i < c.errors.length ? `amax ${show3(at(i))}: error ${c.errors[i].toPrecision(2)}, SQNR ${decibel(c.errors[i])}` : rest;
    }, caption, rest);
    return node("figure", {}, node("h4", {}, "What other ranges would cost"), root, caption);
  }

  // ---- start

  more.id = "more";
  more.type = "button";
  more.addEventListener("click", () => {
    everything = true;
    show();
  });
  table.parentElement.after(more);
  search.addEventListener("input", show);
  branch.addEventListener("change", show);
  state.addEventListener("change", show);
  for (const header of table.tHead.rows[0].cells) header.querySelector("button").addEventListener("click", () => sortBy(header));
  for (const row of rows) row.querySelector(".open").addEventListener("click", () => (opened && opened.row === row ? close() : open(row)));
  for (const picker of document.querySelectorAll("[data-pick]")) {
    picker.addEventListener("click", (event) => {
      event.preventDefault();
      pick(picker.dataset.pick);
    });
  }
  show();
  if (rows.length && charts[rows[0].dataset.quantizer]) open(rows[0]);
})();
