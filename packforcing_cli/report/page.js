"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const n = D.times.length - 1;
  const L = D.layers;
  const NONE = 255, FULL = 250;
  const TRI = (n * (n + 1)) / 2;
  const share = unpack(D.share), score = unpack(D.score), ramp = unpack(D.ramp);
  const shows = D.pictures.some(Boolean);
  const aspect = D.size[0] / D.size[1];
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const state = { column: -1, layer: 0, shown: "share", held: false, row: -1, rows: "time" };
  const cursors = [];   // what follows the chosen column: functions of it
  const charts = [];    // what is drawn anew when the width changes

  // ------------------------------------------------------------------------------------------------- small things

  function unpack(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  function el(tag, values = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(values)) {
      if (name === "text") made.textContent = value;
      else if (name === "class") made.className = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  }
  function svg(tag, values = {}, ...inside) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(values)) {
      if (name === "text") made.textContent = value;
      else if (name === "fill" || name === "stroke") made.style[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  }
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const cell = (plane, column, past) => plane * TRI + (column * (column + 1)) / 2 + past;
  const at = (name) => D.curves[name] || [];
  const known = (values) => values.filter((v) => v !== null && v !== undefined);
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  function clock(seconds, tenths = false) {
    const whole = tenths ? Math.round(seconds * 10) / 10 : Math.round(seconds);
    const h = Math.floor(whole / 3600), m = Math.floor((whole % 3600) / 60), s = whole % 60;
    const tail = (tenths ? s.toFixed(1).padStart(4, "0") : String(s).padStart(2, "0"));
    return h ? `${h}:${String(m).padStart(2, "0")}:${tail}` : `${m}:${tail}`;
  }
  function bytes(value) {
    for (const [unit, scale] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (value >= scale) return `${(value / scale).toFixed(value / scale < 10 ? 2 : 1)} ${unit}`;
    return `${Math.round(value)} B`;
  }
  /** A round number with no digits it does not need: what an axis shows. */
  const short = (text) => text.replace(/(\.\d*?)0+(?= |$)/, "$1").replace(/\.(?= |$)/, "");
  const percentTick = (value) => `${short((value * 100).toFixed(1))} %`;
  const plain = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2));
  const percent = (value) => `${Math.round(value * 100)} %`;
  const spent = (value) => (value < 0.1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);
  const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  function named(column) {
    const first = column * D.step, last = Math.min(first + D.step, D.blocks) - 1;
    return first === last ? `Block ${first}` : `Blocks ${first}–${last}`;
  }
  const columnOf = (block) => Math.floor(block / D.step);
  const start = (column) => D.times[column];
  function niceStep(least, choices) {
    for (const choice of choices) if (choice >= least) return choice;
    return least;
  }
  function ticks(high, wanted) {
    const rough = high / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * niceStep(rough / power, [1, 2, 2.5, 5, 10]);
    const found = [];
    for (let k = 0; k * step <= high * 1.0001; k++) found.push(k * step);
    return found;
  }
  const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  /** Seconds worth a mark on an axis of so many pixels, with their place in columns. */
  function timeTicks(pixels, room = 62) {
    const length = D.times[n];
    const step = niceStep((length * room) / pixels, TIME_STEPS);
    const found = [];
    for (let t = 0; t <= length; t += step) {
      let c = 0;
      while (c < n - 1 && D.times[c + 1] <= t) c++;
      found.push([t, c + clamp((t - D.times[c]) / (D.times[c + 1] - D.times[c] || 1), 0, 1)]);
    }
    return found;
  }
  function pictureOf(column) {
    for (let c = column; c >= 0 && c > column - 8; c--) if (D.pictures[c]) return D.pictures[c];
    return null;
  }
  function color(value) {
    const t = value / FULL;
    const k = Math.round(255 * (dark.matches ? 0.22 + 0.78 * t : 1 - (0.1 + 0.9 * t))) * 3;
    return [ramp[k], ramp[k + 1], ramp[k + 2]];
  }
  /** What a column recalled: [past column, share 0..1, importance 0..1 or null], the most recalled first. */
  function recalled(column, plane = state.layer) {
    const found = [];
    for (let p = 0; p <= column; p++) {
      const s = share[cell(plane, column, p)];
      if (s !== NONE && s > 0) {
        const mark = score[cell(plane, column, p)];
        found.push([p, s / FULL, mark === NONE ? null : mark / FULL]);
      }
    }
    return found.sort((a, b) => b[1] - a[1] || (b[2] ?? 0) - (a[2] ?? 0) || b[0] - a[0]);
  }
  function by(value) {
    if (state.layer) return value >= 0.999 ? "recalled" : `in ${percent(value)} of its blocks`;
    return D.step === 1 ? `${Math.round(value * L)} of ${L} layers` : percent(value);
  }

  // ------------------------------------------------------------------------------------------------- the explorer

  const GLYPHS = { scene: "▸", cut: "✂", pin: "●", retry: "↻", degenerate: "≡" };
  const glyph = (kind) => GLYPHS[kind] || "!";
  const byColumn = new Map();
  for (const event of D.events) {
    if (!byColumn.has(event[0])) byColumn.set(event[0], []);
    byColumn.get(event[0]).push(event);
  }
  const scenes = [0, ...D.events.filter((e) => e[1] === "scene" && e[0]).map((e) => e[0])];
  /** So many stretches of [from, to): the column in the middle, and the ends. */
  function spread(from, to, count) {
    const wide = (to - from) / count;
    return Array.from({ length: count }, (_, k) => [Math.min(to - 1, Math.floor(from + (k + 0.5) * wide)), from + k * wide, from + (k + 1) * wide]);
  }
  const stage = { width: 0, left: 44, height: 0, unit: 1, strip: null, over: null };
  const X = (column) => stage.left + column * stage.unit;
  const Y = (row) => stage.height - (row * stage.height) / n;
  let oldest = 1;  // columns back that a recall ever went
  for (let c = 0; c < n; c++) for (let p = 0; p < c - oldest; p++) if (share[cell(0, c, p)] % NONE) oldest = c - p;
  const byAge = () => state.rows === "age";
  const rowCount = () => (byAge() ? oldest + 1 : n);
  /** Top of the cell of a past column, and its height. */
  const cellTop = (c, p) => (byAge() ? ((c - p) * stage.height) / rowCount() : Y(p + 1));

  function layStage() {
    const width = Math.floor($("timeline").clientWidth);
    if (!width) return;
    stage.width = width;
    stage.left = shows && width > 620 ? 44 + 62 : 44;
    stage.unit = (width - stage.left - 6) / n;
    stage.height = Math.round(clamp(width * 0.5, 200, 430));
    drawStrip();
    drawCells();
    drawOver();
  }

  function drawStrip() {
    const lane = 18, arcs = L ? 74 : 6, film = shows ? Math.round(clamp(stage.width / 18, 30, 50)) : 0;
    const top = lane + arcs, foot = top + film;
    const root = svg("svg", { width: stage.width, height: foot + 20, "aria-hidden": "true" });
    stage.strip = { root, top, film, foot, arcs: svg("g"), here: svg("rect", { class: "here", rx: 2 }) };
    if (scenes.length > 1)
      scenes.forEach((from, k) => {
        const room = X(k + 1 < scenes.length ? scenes[k + 1] : n) - X(from) - 8;
        const fits = Math.floor(room / 6);
        const said = D.prompts[D.scenes[from]] || "";
        if (fits > 4)
          root.append(svg("text", { class: "scene", x: X(from) + 2, y: 11, text: said.length > fits ? said.slice(0, fits - 1) + "…" : said }));
        if (from) root.append(svg("line", { class: "ref", x1: X(from), x2: X(from), y1: 0, y2: foot }));
      });
    root.append(stage.strip.arcs);
    if (shows) {
      scenes.forEach((from, k) => {  // a scene's frames stand in the scene
        const to = k + 1 < scenes.length ? scenes[k + 1] : n, count = Math.max(1, Math.round((X(to) - X(from)) / (film * aspect)));
        for (const [c, low, high] of spread(from, to, count)) {
          const uri = pictureOf(c);
          if (uri) root.append(svg("image", { href: uri, x: X(low), y: top, width: Math.max(1, X(high) - X(low) - 1), height: film, preserveAspectRatio: "xMidYMid slice" }));
        }
      });
    }
    for (const [column, events] of byColumn)
      for (const event of events)
        if (event[1] !== "scene")
          root.append(svg("text", { class: "event halo", x: X(column + 0.5), y: top - 4, text: glyph(event[1]) }, svg("title", { text: event[2] })));
    root.append(stage.strip.here);
    root.append(svg("line", { class: "axis", x1: stage.left, x2: stage.width - 6, y1: foot + 1, y2: foot + 1 }));
    for (const [t, c] of timeTicks(stage.width - stage.left - 6))
      root.append(svg("text", { x: X(c), y: foot + 14, "text-anchor": "middle", text: clock(t) }));
    $("strip").replaceChildren(root);
  }

  function drawCells() {
    const canvas = $("cells"), small = document.createElement("canvas");
    small.width = n;
    small.height = rowCount();
    const pen = small.getContext("2d"), image = pen.createImageData(n, rowCount());
    const values = state.shown === "share" ? share : score;
    for (let c = 0; c < n; c++)
      for (let p = 0; p <= c; p++) {
        const value = values[cell(state.layer, c, p)];
        if (!L || value === NONE) continue;
        const row = byAge() ? c - p : n - 1 - p;
        if (row >= rowCount()) continue;
        const i = (row * n + c) * 4;
        if (state.shown === "share" && value === 0) image.data.set(dark.matches ? [255, 255, 255, 18] : [28, 27, 26, 15], i);
        else image.data.set([...color(value), 255], i);
      }
    pen.putImageData(image, 0, 0);
    const dpr = window.devicePixelRatio || 1;
    canvas.width = Math.round(stage.width * dpr);
    canvas.height = Math.round(stage.height * dpr);
    canvas.style.width = `${stage.width}px`;
    canvas.style.height = `${stage.height}px`;
    const out = canvas.getContext("2d");
    out.imageSmoothingEnabled = false;
    out.drawImage(small, stage.left * dpr, 0, n * stage.unit * dpr, stage.height * dpr);
  }

  function drawOver() {
    const root = svg("svg", { width: stage.width, height: stage.height + 4, "aria-hidden": "true" });
    const hatch = svg("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("line", { class: "axis", x1: 0, x2: 0, y1: 0, y2: 5, stroke: "var(--soft)" }));
    root.append(svg("defs", {}, hatch));
    const sinks = Math.max(0, ...D.sinks.map((ids) => (ids.length && ids.length < D.blocks / 2 ? columnOf(ids[ids.length - 1]) + 1 : 0)));
    if (sinks && sinks < n && !byAge())
      root.append(svg("rect", { x: X(sinks), y: Y(sinks), width: X(n) - X(sinks), height: Y(0) - Y(sinks), fill: "url(#hatch)" }));
    for (const [from, kind] of D.events.map((e) => [e[0], e[1]]))
      if (kind === "scene") {
        root.append(svg("line", { class: "ref", x1: X(from), x2: X(from), y1: 0, y2: Y(0) }));
        if (!byAge()) root.append(svg("line", { class: "ref", x1: X(from), x2: X(n), y1: Y(from), y2: Y(from) }));
      }
    if (byAge()) {
      const length = (D.times[n] / n) * rowCount();
      const step = niceStep(length / 8, TIME_STEPS);
      for (let t = 0; t < length; t += step) {
        const y = (t / length) * stage.height;
        if (y < stage.height - 4) root.append(svg("text", { x: stage.left - 6, y: y + 10, "text-anchor": "end", text: t ? `−${clock(t)}` : "now" }));
      }
    } else for (const [t, c] of timeTicks(stage.height, shows && stage.left > 60 ? 40 : 30))
      if (Y(c) > 6) root.append(svg("text", { x: 38, y: Y(c) + 4, "text-anchor": "end", text: clock(t) }));
    if (stage.left > 60 && !byAge()) {
      scenes.forEach((from, k) => {
        const to = k + 1 < scenes.length ? scenes[k + 1] : n, count = Math.max(1, Math.round((Y(from) - Y(to)) / (56 / aspect)));
        for (const [c, low, high] of spread(from, to, count)) {
          const uri = pictureOf(c);
          if (uri) root.append(svg("image", { href: uri, x: 44, y: Y(high), width: 56, height: Math.max(1, Y(low) - Y(high) - 1), preserveAspectRatio: "xMidYMid slice" }));
        }
      });
    }
    root.append(svg("line", { class: "axis", x1: stage.left, x2: X(n), y1: Y(0), y2: Y(0) }));
    const column = svg("rect", { class: "here", y: 0, height: stage.height });
    const row = svg("rect", { class: "kept", x: stage.left });
    const said = svg("g");
    root.append(row, column, said);
    stage.over = { column, row, said };
    $("over").replaceChildren(root);
  }

  function drawScale() {
    const box = $("scale");
    box.replaceChildren();
    if (!L) return;
    const scored = state.shown === "score";
    const strip = el("canvas", { width: 96, height: 12, "aria-hidden": "true" }), pen = strip.getContext("2d");
    for (let x = 0; x < 96; x++) {
      pen.fillStyle = `rgb(${color((x / 95) * FULL).join(",")})`;
      pen.fillRect(x, 0, 1, 12);
    }
    const ends = scored ? ["importance 0, the least of its bank", "1, the largest"]
      : state.layer ? ["recalled in few of a column's blocks", "in all"]
      : ["recalled by few layers", `by all ${L}`];
    if (!scored && state.layer && D.step === 1)
      box.append(el("span", { class: "ramp" }, cropped(strip), el("span", { text: "recalled" })));
    else box.append(el("span", { class: "ramp" }, el("span", { text: ends[0] }), strip, el("span", { text: ends[1] })));
    if (!scored) box.append(el("span", {}, el("i", { class: "seen" }), "in the bank, not recalled"));
    const most = Math.max(0, ...known(D.active));
    if (!scored && most && most < Math.max(...known(at("bank_blocks"))))
      $("keys").dataset.more = `Until the bank has more than ${most} blocks, all of it is recalled.`;
    if (!byAge()) box.append(el("span", {}, el("i", { class: "sunk" }), "sink: always seen"));
    const kinds = [...new Set(D.events.map((e) => e[1]))].filter((k) => k !== "scene");
    for (const kind of kinds) box.append(el("span", { text: `${glyph(kind)} ${kind}` }));
  }
  function cropped(strip) {
    const one = el("canvas", { width: 14, height: 12 }), pen = one.getContext("2d");
    pen.fillStyle = `rgb(${color(FULL).join(",")})`;
    pen.fillRect(0, 0, 14, 12);
    return one;
  }

  function markColumn() {
    const c = state.column, { strip, over } = stage;
    if (!strip) return;
    const wide = Math.max(stage.unit, 3), x = X(c + 0.5) - wide / 2;
    for (const [name, value] of Object.entries({ x, y: strip.top, width: wide, height: Math.max(strip.film, 2) })) strip.here.setAttribute(name, value);
    over.column.setAttribute("x", x);
    over.column.setAttribute("width", wide);
    strip.arcs.replaceChildren(...recalled(c).filter(([p]) => p !== c).map(([p, s]) => {
      const x1 = X(p + 0.5), x2 = X(c + 0.5), rx = (x2 - x1) / 2;
      const high = Math.min(rx, (strip.top - 24) * Math.sqrt((c - p) / n));
      return svg("path", { class: "arc", d: `M${x1} ${strip.top - 1}A${rx} ${high} 0 0 1 ${x2} ${strip.top - 1}`,
        "stroke-width": (0.6 + 2 * s).toFixed(2), "stroke-opacity": (0.2 + 0.7 * s).toFixed(2) });
    }));
    markRow();
  }
  function markRow() {
    const { over } = stage, c = state.column, p = state.row;
    over.said.replaceChildren();
    const on = p >= 0 && p <= c;
    over.row.setAttribute("width", on ? Math.max(0, X(c) - stage.left) : 0);
    over.row.setAttribute("y", on ? cellTop(c, p) : 0);
    over.row.setAttribute("height", on ? Math.max(2, stage.height / rowCount()) : 0);
    for (const item of document.querySelectorAll(".past button")) item.classList.toggle("hot", on && Number(item.dataset.column) === p);
    if (!on || p === c || stage.width < 520) return;
    const low = byAge() ? stage.height - 44 : 20;
    const lines = [`${clock(start(c))} looks back at ${clock(start(p))}`];
    const s = share[cell(state.layer, c, p)], mark = score[cell(state.layer, c, p)];
    if (D.sinks[c].some((b) => columnOf(b) === p)) lines.push("sink: always seen");
    else if (D.recent[c].some((b) => columnOf(b) === p)) lines.push("recent: seen whole");
    else if (s === NONE) lines.push("not in the bank");
    else lines.push(s ? `recalled: ${by(s / FULL)}` : "in the bank, not recalled");
    if (mark !== NONE) lines.push(`importance ${(mark / FULL).toFixed(2)}`);
    lines.forEach((text, k) => over.said.append(svg("text", { class: k ? "halo" : "halo strong", x: stage.left + 10, y: low + 16 * k, "font-size": 13, text })));
  }

  function drawDetail() {
    const c = state.column, box = $("detail"), list = recalled(c);
    const bank = at("bank_blocks")[c], active = D.active[c], uri = pictureOf(c);
    const inside = [el("h3", { text: `${named(c)} · ${clock(start(c), D.step === 1)}–${clock(D.times[c + 1], D.step === 1)}` })];
    if (uri) inside.push(el("img", { class: "now", src: uri, alt: `First frame of ${named(c).toLowerCase()}` }));
    if (D.prompts.length > 1) inside.push(el("p", { class: "prompt", dir: "auto", text: D.prompts[D.scenes[c]] }));
    const events = (byColumn.get(c) || []).filter((e) => e[1] !== "scene");
    if (events.length)
      inside.push(el("ul", { class: "flags" }, ...events.map((e) =>
        el("li", { class: e[1] === "pin" || e[1] === "cut" ? "quiet" : "" }, el("b", { text: `${glyph(e[1])} ${e[1]}` }), `${e[2]}${e[3] > 1 ? ` (${e[3]} blocks here)` : ""}`))));
    if (active !== null && bank !== undefined && bank !== null) {
      const union = list.length, which = state.layer ? `Layer ${state.layer - 1}` : "Each layer";
      inside.push(el("p", { class: "say", text: !bank ? "The bank was still empty: it saw the sink, the newest blocks and itself."
        : D.step > 1 ? `${which} recalled ${active} of ${Math.round(bank)} bank blocks at a time; from ${many(union, "column")} in all.`
        : `${which} recalled ${active} of ${many(bank, "bank block")}${state.layer ? "." : `; together they chose ${union} different ones.`}` }));
    }
    const past = el("div", { class: "scroll" });
    const frame = (p, lines, value) => {
      const shot = pictureOf(p), label = `${named(p)}, ${lines.filter(Boolean).join(", ")}`;
      const button = el("button", { type: "button", "data-column": p, "aria-label": `Go to ${label}`, onclick: () => { state.held = true; choose(p); $("timeline").focus(); } },
        ...(shot ? [el("img", { src: shot, alt: "" })] : shows ? [el("span", { class: "none" })] : []),
        el("span", { class: "when" }, el("b", { text: clock(start(p)) }), el("span", { class: "ago", text: lines[0] })));
      if (value !== null) {
        const bar = el("span");
        bar.style.width = `${Math.round(value * 100)}%`;
        button.append(el("span", { class: "meter" }, bar));
      }
      for (const line of lines.slice(1)) if (line) button.append(el("span", { class: "why", text: line }));
      button.addEventListener("pointerenter", () => { state.row = p; markRow(); });
      button.addEventListener("focus", () => { state.row = p; markRow(); });
      return el("li", {}, button);
    };
    const ago = (p) => `−${clock(start(c) - start(p))}`;
    const whole = [...new Set([...D.sinks[c].map((b) => [columnOf(b), "sink"]), ...D.recent[c].map((b) => [columnOf(b), "recent"])].map(JSON.stringify))].map((t) => JSON.parse(t)).filter(([p]) => p !== c);
    if (list.length) {
      const shownMost = 60;
      past.append(el("h4", { text: `Recalled from the bank, most ${state.layer ? "important" : "agreed on"} first` }), el("ul", { class: "past" }, ...list.slice(0, shownMost).map(([p, s, mark]) =>
        frame(p, [ago(p), by(s), mark === null ? "" : `importance ${mark.toFixed(2)}`, D.pins[c].some((b) => columnOf(b) === p) ? "pinned" : ""], s))));
      if (list.length > shownMost) past.append(el("p", { class: "hint", text: `and ${list.length - shownMost} more.` }));
    }
    if (whole.length && whole.length <= 12)
      past.append(el("h4", { text: "Seen whole" }), el("ul", { class: "past" }, ...whole.map(([p, why]) => frame(p, [ago(p), why], null))));
    inside.push(past);
    box.replaceChildren(...inside);
    fitDetail();
  }
  function fitDetail() {
    const past = document.querySelector(".scroll");
    if (!past) return;
    past.style.maxHeight = "";
    if (!matchMedia("(min-width: 1001px)").matches) return;
    const stageBox = document.querySelector(".stage").getBoundingClientRect(), top = past.getBoundingClientRect().top;
    past.style.maxHeight = `${Math.max(220, stageBox.bottom - top - 16)}px`;
  }

  function choose(column) {
    const c = clamp(Math.round(column), 0, n - 1);
    if (c === state.column) return;
    state.column = c;
    const slider = $("timeline"), list = recalled(c).slice(0, 3);
    slider.setAttribute("aria-valuemin", 0);
    slider.setAttribute("aria-valuemax", n - 1);
    slider.setAttribute("aria-valuenow", c);
    slider.setAttribute("aria-valuetext", `${named(c)} at ${clock(start(c))}. ` +
      (list.length ? `Recalled ${many(recalled(c).length, D.step === 1 ? "block" : "column")}, most of all those at ${list.map(([p]) => clock(start(p))).join(", ")}.` : "Recalled nothing."));
    markColumn();
    drawDetail();
    for (const follow of cursors) follow(c);
  }

  const columnAt = (x) => clamp(Math.floor((x - stage.left) / stage.unit), 0, n - 1);
  const timeline = $("timeline");
  timeline.addEventListener("pointermove", (event) => {
    const box = timeline.getBoundingClientRect(), map = $("map").getBoundingClientRect();
    const inMap = event.clientY >= map.top && event.clientY <= map.bottom;
    if (!state.held && event.clientX - box.left >= stage.left) choose(columnAt(event.clientX - box.left));
    const row = clamp(Math.floor(((event.clientY - map.top) / stage.height) * rowCount()), 0, rowCount() - 1);
    state.row = !inMap ? -1 : byAge() ? state.column - row : n - 1 - row;
    markRow();
  });
  timeline.addEventListener("pointerleave", () => { state.row = -1; markRow(); });
  timeline.addEventListener("click", (event) => {
    const box = timeline.getBoundingClientRect(), c = columnAt(event.clientX - box.left);
    state.held = !(state.held && c === state.column);
    choose(c);
  });
  timeline.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
    if (event.key === "Home") choose(0);
    else if (event.key === "End") choose(n - 1);
    else if (event.key === "Escape") state.held = false;
    else if (event.key in moves && !event.altKey && !event.ctrlKey && !event.metaKey) {
      state.held = true;
      choose(state.column + moves[event.key]);
    } else return;
    event.preventDefault();
  });

  // ----------------------------------------------------------------------------------------------------- charts

  const DASHES = ["", "7 3", "2 3", "10 3 2 3"];

  function reference(ref) {
    const swatch = svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, svg("line", { class: "ref", x1: 0, x2: 22, y1: 6, y2: 6 }));
    return el("li", { class: "of" }, swatch, ref.label);
  }

  /** A plot over the video. spec: title, text, lines | stack: [{name, values, color, dash}], refs, format, low, high. */
  function chart(board, spec) {
    const rows = (spec.stack || spec.lines).filter((row) => known(row.values).length);
    if (!rows.length) return;
    const plot = el("div", { class: "plot" });
    const key = el("ul", { class: "key" });
    const figure = el("figure", { class: `chart${spec.wide ? " wide" : ""}` }, el("figcaption", {}, el("h3", { text: spec.title }), spec.text || ""), plot, key);
    board.append(figure);
    const format = spec.format || plain;
    const sums = [];
    if (spec.stack) for (let c = 0; c < n; c++) sums.push(rows.reduce((sum, row) => sum + (row.values[c] ?? 0), 0));
    const tops = spec.stack ? sums : rows.flatMap((row) => known(row.values));
    const refs = spec.refs || [];
    const high = spec.high ?? Math.max(...tops, ...refs.map((ref) => ref.value)) * 1.08;
    const low = spec.low ?? 0;
    const about = rows.map((row) => { const all = known(row.values); return `${row.name}: ${format(all[0])} at first, ${format(all[all.length - 1])} at last, mean ${format(mean(all))}`; });
    const values = rows.map((row) => el("b"));
    (spec.stack ? rows.map((row, k) => k).reverse() : rows.map((row, k) => k)).forEach((k) => {
      const row = rows[k];
      const swatch = svg("svg", { width: 22, height: 12, "aria-hidden": "true" });
      swatch.append(spec.stack ? svg("rect", { x: 4, y: 0, width: 14, height: 12, fill: row.color })
        : svg("line", { x1: 0, x2: 22, y1: 6, y2: 6, stroke: row.color, "stroke-width": 2.4, "stroke-dasharray": row.dash || "" }));
      key.append(el("li", {}, swatch, row.name, values[k]));
    });
    for (const ref of refs) key.append(reference(ref));
    const when = el("li", { class: "of" });
    key.append(when);
    let cursor = null, geometry = null;
    function draw() {
      const width = Math.floor(plot.clientWidth), height = spec.height || 190;
      if (!width) return;
      const left = 54, right = 10, top = 8, bottom = 22;
      const x = (c) => left + (c * (width - left - right)) / n;
      const y = (v) => top + (height - top - bottom) * (1 - (v - low) / (high - low || 1));
      geometry = { left, unit: (width - left - right) / n };
      const root = svg("svg", { width, height, role: "img", "aria-label": `${spec.title}. ${about.join("; ")}.${refs.map((r) => ` ${r.label}.`).join("")}` });
      for (const v of ticks(high - low, 4).map((v) => v + low)) {
        root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
        root.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", text: v === 0 ? "0" : short((spec.tick || format)(v)) }));
      }
      for (const [t, c] of timeTicks(width - left - right)) root.append(svg("text", { x: x(c), y: height - 6, "text-anchor": "middle", text: clock(t) }));
      if (spec.stack) {
        const base = new Array(n).fill(0);
        for (const row of rows) {
          const upper = base.map((b, c) => b + (row.values[c] ?? 0));
          const points = upper.map((v, c) => `${x(c + 0.5).toFixed(1)} ${y(v).toFixed(1)}`);
          const back = base.map((v, c) => `${x(c + 0.5).toFixed(1)} ${y(v).toFixed(1)}`).reverse();
          root.append(svg("path", { class: "area", d: `M${points.join("L")}L${back.join("L")}Z`, fill: row.color }));
          upper.forEach((v, c) => { base[c] = v; });
        }
      } else
        for (const row of rows) {
          let d = "", pen = false;
          row.values.forEach((v, c) => {
            if (v === null || v === undefined) { pen = false; return; }
            d += `${pen ? "L" : "M"}${x(c + 0.5).toFixed(1)} ${y(clamp(v, low, high)).toFixed(1)}`;
            if (!pen && (row.values[c + 1] ?? null) === null) d += "h.01";
            pen = true;
          });
          root.append(svg("path", { class: "line", d, stroke: row.color, "stroke-dasharray": row.dash || "", "stroke-linecap": "round" }));
        }
      for (const ref of refs) {
        root.append(svg("line", { class: "ref", x1: left, x2: width - right, y1: y(ref.value), y2: y(ref.value) }));
      }
      root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(low), y2: y(low) }));
      cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom });
      root.append(cursor);
      plot.replaceChildren(root);
      follow(state.column);
    }
    function follow(c) {
      if (!cursor || c < 0) return;
      const x = geometry.left + (c + 0.5) * geometry.unit;
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      rows.forEach((row, k) => { const v = row.values[c]; values[k].textContent = v === null || v === undefined ? "–" : format(v); });
      when.textContent = spec.stack && spec.total ? `${format(sums[c])} in all, at ${clock(start(c))}` : `at ${clock(start(c))}`;
    }
    plot.addEventListener("pointermove", (event) => {
      if (geometry && !state.held) choose(Math.floor((event.clientX - plot.getBoundingClientRect().left - geometry.left) / geometry.unit));
    });
    plot.addEventListener("click", (event) => {
      if (!geometry) return;
      const c = clamp(Math.floor((event.clientX - plot.getBoundingClientRect().left - geometry.left) / geometry.unit), 0, n - 1);
      state.held = !(state.held && c === state.column);
      choose(c);
    });
    cursors.push(follow);
    charts.push(draw);
  }

  /** Bars over something that is not the video's time. bars: [{from, to, value, low, high, label}]. */
  function bars(board, spec) {
    if (!spec.bars.length) return;
    const plot = el("div", { class: "plot" });
    board.append(el("figure", { class: "chart" }, el("figcaption", {}, el("h3", { text: spec.title }), spec.text || ""), plot,
      el("ul", { class: "key" }, ...(spec.refs || []).map(reference))));
    const high = spec.high ?? Math.max(...spec.bars.map((bar) => bar.value)) * 1.12;
    charts.push(() => {
      const width = Math.floor(plot.clientWidth), height = 190;
      if (!width) return;
      const left = 54, right = 10, top = 8, bottom = 36;
      const ends = [spec.bars[0].from, spec.bars[spec.bars.length - 1].to];
      const x = (v) => left + ((v - ends[0]) * (width - left - right)) / (ends[1] - ends[0] || 1);
      const y = (v) => top + (height - top - bottom) * (1 - v / high);
      const root = svg("svg", { width, height, role: "img", "aria-label": `${spec.title}. ${spec.bars.map((bar) => bar.label).join("; ")}` });
      for (const v of ticks(high, 4)) {
        root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
        root.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", text: v === 0 ? "0" : short(spec.format(v)) }));
      }
      for (const bar of spec.bars) {
        const x1 = x(bar.from) + 1, wide = Math.max(1, x(bar.to) - x(bar.from) - 2), middle = x1 + wide / 2;
        root.append(svg("rect", { x: x1, y: y(bar.value), width: wide, height: Math.max(0, y(0) - y(bar.value)), rx: 2, fill: "var(--a)", "fill-opacity": bar.low === undefined ? 1 : 0.5 }, svg("title", { text: bar.label })));
        if (bar.low !== undefined)
          root.append(svg("path", { d: `M${middle} ${y(bar.low)}V${y(bar.high)}M${middle - 4} ${y(bar.low)}h8M${middle - 4} ${y(bar.high)}h8`, stroke: "var(--ink)", "stroke-width": 1.4 }));
      }
      for (const ref of spec.refs || []) {
        root.append(svg("line", { class: "ref", x1: left, x2: width - right, y1: y(ref.value), y2: y(ref.value) }));
      }
      root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(0), y2: y(0) }));
      for (const [v, text, anchor] of spec.ends(ends)) root.append(svg("text", { x: x(v), y: height - bottom + 14, "text-anchor": anchor, text }));
      root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle", text: spec.axis }));
      plot.replaceChildren(root);
    });
  }

  function section(title, text) {
    const board = el("div", { class: "board" });
    const made = el("section", {}, el("h2", { text: title }), el("p", { class: "lead", text }), board);
    return { made, board, close: () => { if (board.children.length) $("charts").append(made); } };
  }

  const ratio = (values) => {
    const first = mean(known(values.slice(0, Math.max(1, D.times.findIndex((t) => t >= 5)))));
    return values.map((v) => (v === null || !first ? null : v / first));
  };
  const COLORS = { sink: "var(--sink)", recent: "var(--recent)", mid: "var(--mid)", current: "var(--current)", reserve: "var(--reserve)", bank: "var(--bank)" };
  const NAMES = { sink: "sink", recent: "recent", mid: "recalled", current: "current", reserve: "raw keys, backups", bank: "bank" };

  function buildCharts() {
    const memory = section("How much it holds", "Keys and values in memory while each block was made. A full cache grows by a whole block each time; here only the bank does, by a compressed one, until it is full.");
    chart(memory.board, { title: "Against a full cache", text: "What is held here, what every block kept whole would take, and what a plain window of the newest blocks takes.", format: bytes, lines: [
      { name: "held here", values: at("live"), color: "var(--a)" },
      { name: "full cache", values: at("full"), color: "var(--b)", dash: DASHES[1] },
      { name: "window", values: at("window"), color: "var(--c)", dash: DASHES[2] }] });
    chart(memory.board, { title: "By partition", text: "The same memory in its parts. “Recalled” are the compressed blocks attended; the bank keeps them all.", format: bytes, total: true,
      stack: D.parts.map((part) => ({ name: NAMES[part], values: at(part), color: COLORS[part] })) });
    memory.close();

    const chose = section("How it chose", "What the recalls say as a whole. Dashed lines marked “paper” are PackForcing's own figures, of another model.");
    bars(chose.board, { title: "Importance by place in the bank", high: 1, format: plain, axis: "place in the bank",
      text: "Mean normalised score of the bank's blocks, from the oldest tenth to the newest; whiskers are the least and the largest layer.",
      bars: (D.importance[0] || []).map((_, k) => { const all = known(D.importance.map((row) => row[k])); return all.length ? { from: k / 10, to: (k + 1) / 10, value: mean(all), low: Math.min(...all), high: Math.max(...all), label: `${k * 10} to ${k * 10 + 10} %: ${mean(all).toFixed(2)}` } : null; }).filter(Boolean),
      refs: [{ value: D.paper.importance, label: `paper: mean ${D.paper.importance}, nearly flat` }], ends: ([a, b]) => [[a, "oldest", "start"], [b, "newest", "end"]] });
    bars(chose.board, { title: "How far back it looked", format: percentTick, axis: "age of what was recalled", text: "Share of all recalls by their age, counted once a layer and block. Older ages were possible less often.",
      bars: D.ages.map(([from, to, value]) => ({ from, to, value, label: `${clock(from)} to ${clock(to)}: ${(value * 100).toFixed(1)} %` })),
      ends: ([a, b]) => [[a, `${clock(a)} ago`, "start"], [(a + b) / 2, `${clock((a + b) / 2)}`, "middle"], [b, `${clock(b)} ago`, "end"]] });
    chart(chose.board, { title: "Churn", text: "How much of what is recalled changes from one block to the next: 0 nothing, 1 all of it.", low: 0, high: 1, lines: [{ name: "Jaccard distance", values: at("churn"), color: "var(--a)" }], refs: [{ value: D.paper.churn, label: `paper: ${D.paper.churn}` }] });
    chart(chose.board, { title: "Position diversity", text: "How evenly recall draws on the whole bank: 1 from everywhere alike, 0 from one place.", low: 0, high: 1, lines: [{ name: "diversity", values: at("diversity"), color: "var(--a)" }], refs: [{ value: D.paper.diversity, label: `paper: above ${D.paper.diversity}` }] });
    chart(chose.board, { title: "Never recalled so far", text: "Of the blocks that were in the bank up to here, the share that no layer has recalled yet.", low: 0, high: Math.min(1, Math.max(0.1, ...known(at("never"))) * 1.2), format: percent, tick: percentTick, lines: [{ name: "never recalled", values: at("never"), color: "var(--a)" }] });
    chart(chose.board, { title: "Blocks in the bank", text: "How many are kept, and how many of them at least one layer recalled.", format: (v) => String(Math.round(v)), lines: [{ name: "in the bank", values: at("bank_blocks"), color: "var(--b)", dash: DASHES[1] }, { name: "recalled by a layer", values: at("union"), color: "var(--a)" }] });
    chose.close();

    const places = section("Where things stand in time", "Every block gets contiguous slots, counted back from the current one, so that distances stay where the model was trained.");
    chart(places.board, { title: "Slots taken", wide: true, text: "Latent frames each partition takes in the context.", format: (v) => String(Math.round(v * 100) / 100), total: true,
      stack: [["at_sink", "sink", "sink"], ["at_mid", "recalled", "mid"], ["at_recent", "recent", "recent"], ["at_current", "current", "current"]].map(([name, shown, color]) => ({ name: shown, values: at(name), color: COLORS[color] })),
      refs: D.trained ? [{ value: D.trained, label: `trained range: ${D.trained}` }] : [] });
    places.close();

    const picture = section("The picture", "A long video must not fade, burn or blur. 1.0 is the mean of the first five seconds.");
    const from = shows ? "On the first frame of each block." : "On the frames as they were made.";
    chart(picture.board, { title: "Drift", text: `${from} Luma, saturation and sharpness against the first five seconds. A new prompt moves them, too.`, lines: [
      { name: "luma", values: ratio(at("seen_luma").length ? at("seen_luma") : at("luma")), color: "var(--a)" },
      { name: "saturation", values: ratio(at("seen_saturation")), color: "var(--b)", dash: DASHES[1] },
      { name: "sharpness", values: ratio(at("seen_sharpness")), color: "var(--c)", dash: DASHES[2] }], refs: [{ value: 1, label: "first 5 s" }] });
    chart(picture.board, { title: "Motion", text: "Change from frame to frame, in levels of 255: the usual one in a block, and the largest.", lines: [
      { name: "motion", values: at("motion"), color: "var(--a)" }, { name: "largest step", values: at("jump"), color: "var(--b)", dash: DASHES[1] }] });
    picture.close();

    const time = section("Time", "What each block cost, and the memory of the whole process.");
    chart(time.board, { title: "Seconds a block", wide: !at("resident").length, format: spent, total: true, text: "By stage. “Clean” is the pass that leaves keys and values; “bookkeeping” is commit, journal and trace; “stall” is waiting for the video encoder.",
      stack: [["denoise"], ["clean"], ["decode"], ["compress"], ["commit", "journal", "trace"], ["stall"]].map((names, k) => ({
        name: names.length > 1 ? "bookkeeping" : names[0], color: `var(--st${k})`,
        values: Array.from({ length: n }, (_, c) => { const all = known(names.map((name) => at(name)[c])); return all.length ? all.reduce((a, b) => a + b, 0) : null; }) })),
      refs: [{ value: D.times[n] - D.times[n - 1], label: "real time" }] });
    chart(time.board, { title: "Memory of the process", format: bytes, text: "Resident memory, weights included; on a GPU also what was allocated there.", lines: [
      { name: "resident", values: at("resident"), color: "var(--a)" },
      { name: "GPU", values: at("device").some(Boolean) ? at("device") : [], color: "var(--b)", dash: DASHES[1] }] });
    time.close();

    const stood = D.events.filter((e) => e[1] !== "scene" && e[1] !== "pin" && e[1] !== "cut");
    const table = section("What stood out", stood.length ? "" : "Nothing: no health flag, no block made again, no scores that said nothing.");
    table.board.remove();
    if (stood.length) {
      const rows = stood.slice(0, 100).map((e) => el("tr", {}, el("td", { text: clock(start(e[0])) }), el("td", { text: named(e[0]) }), el("td", { text: `${glyph(e[1])} ${e[1]}` }), el("td", { text: e[2] + (e[3] > 1 ? ` (${e[3]} blocks)` : "") })));
      table.made.append(el("table", {}, el("thead", {}, el("tr", {}, ...["time", "block", "what", ""].map((text) => el("th", { scope: "col", text })))), el("tbody", {}, ...rows)));
      if (stood.length > 100) table.made.append(el("p", { class: "hint", text: `and ${stood.length - 100} more.` }));
    }
    if (at("luma").length || stood.length) $("charts").append(table.made);
  }

  // ------------------------------------------------------------------------------------------------------- begin

  const pick = $("layer");
  pick.append(el("option", { value: 0, text: `mean of all ${L}` }), ...Array.from({ length: L }, (_, k) => el("option", { value: k + 1, text: String(k) })));
  if (!D.scored) $("shown").hidden = true;
  if (!L) document.querySelector(".controls").hidden = true;
  function redraw() {
    drawCells();
    drawScale();
    const c = state.column;
    state.column = -1;
    choose(c);
  }
  if (oldest * 2 < n) state.rows = $("rows").value = "age";  // else the map would be a thin line
  $("rows").addEventListener("change", () => { state.rows = $("rows").value; drawOver(); redraw(); });
  pick.addEventListener("change", () => { state.layer = Number(pick.value); redraw(); });
  for (const choice of document.querySelectorAll("input[name=shown]"))
    choice.addEventListener("change", () => { state.shown = choice.value; redraw(); });
  dark.addEventListener("change", () => { drawCells(); drawScale(); });

  /** Where to begin: soon after the last change of the prompt, when the memory has settled; else at the end. */
  function telling() {
    const c = scenes[scenes.length - 1] + Math.ceil(3 / D.step);
    return scenes.length > 1 && c < n ? c : n - 1;
  }
  let waiting = 0;
  function layAll() {
    layStage();
    for (const draw of charts) draw();
    if (state.column >= 0) markColumn();
    fitDetail();
  }
  buildCharts();
  layAll();
  drawScale();
  choose(telling());
  layAll();
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(layAll); });
  addEventListener("beforeprint", layAll);
  document.documentElement.dataset.ready = "yes";
})();
