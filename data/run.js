"use strict";
const { watched, ...first } = JSON.parse(document.getElementById("content").textContent);
let runs = first.runs;
const view = { colour: "kl", sort: "score", down: true, run: 0, numbers: false, shown: 12, open: new Set(), alike: null, dark: null };
const SVG = "http://www.w3.org/2000/svg";

// Elements are made from text alone: nothing of a run is ever parsed as HTML.
function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "css") Object.assign(element.style, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make(SVG, tag, attributes, children);

// Control characters, and those that turn the direction of a line, are shown by their names.
const visible = text => String(text ?? "").replace(/\r\n?|[\u2028\u2029]/g, "\n")
  .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    c => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const text = (content, empty = "(empty)") => h("span", { class: "text" }, visible(content) || h("i", { class: "soft" }, empty));
const finite = x => typeof x === "number" && Number.isFinite(x);
function number(x, signed = false) {
  if (!finite(x)) return "–";
  if (Number.isInteger(x) && x) return (signed && x > 0 ? "+" : "") + x.toLocaleString("en").replace("-", "−");
  const size = Math.abs(x);
  const digits = size >= 1000 ? x.toLocaleString("en", { maximumFractionDigits: 0 }) : size >= 100 ? x.toFixed(0)
    : size >= 10 ? x.toFixed(1) : size >= 0.01 || size === 0 ? x.toFixed(size >= 1 ? 2 : 3) : size < 5e-5 ? "0" : x.toFixed(4);
  return (signed && x > 0 && digits !== "0" ? "+" : "") + digits.replace("-", "−");
}
const clock = seconds => seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
const colour = i => `var(--c${i % 5})`;
const button = (label, pressed, click) => h("button", { type: "button", "aria-pressed": String(pressed), onclick: click }, label);

// --- curves ---------------------------------------------------------------------------------------------------------

function ticks(low, high, n) {
  const rough = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= rough * 0.999);
  const found = [];
  const how = { maximumFractionDigits: Math.max(0, -Math.floor(Math.log10(step))), notation: high >= 1e4 ? "compact" : "standard" };
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-6; x += step)
    found.push([x, (Math.abs(x) < step * 1e-6 ? 0 : x).toLocaleString("en", how).replace("-", "−")]);
  return found;
}

function smooth(points) {  // the running mean that curves.png draws
  const reach = Math.floor(points.length / 30);
  return points.map(([x], i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1);
    return [x, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
}

// series: {label, kind: line | dots | path, points, colour, dash}
function chart(title, unit, series, x_unit, W = 340) {
  const H = 190, left = 40, right = 8, top = 8, bottom = 24;
  series = series.map(each => ({ ...each, points: each.points.filter(point => point.every(finite)) })).filter(each => each.points.length);
  const all = series.flatMap(each => each.points);
  if (!all.length) return null;
  const bound = (i, f) => all.reduce((found, point) => f(found, point[i]), all[0][i]);
  let [x0, x1, y0, y1] = [bound(0, Math.min), bound(0, Math.max), bound(1, Math.min), bound(1, Math.max)];
  if (x1 === x0) x1 = x0 + 1;
  const pad = (y1 - y0) * 0.06 || Math.abs(y0) * 0.1 || 1;
  y0 -= pad; y1 += pad;
  const X = x => left + (x - x0) / (x1 - x0) * (W - left - right), Y = y => top + (y1 - y) / (y1 - y0) * (H - top - bottom);
  const line = points => points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
  const drawn = series.map(each => {
    const stroke = { fill: "none", stroke: each.colour, "stroke-linejoin": "round" };
    if (each.kind === "line") return [
      s("path", { d: line(each.points), ...stroke, "stroke-width": 1, opacity: 0.28 }),
      s("path", { d: line(smooth(each.points)), ...stroke, "stroke-width": 1.9, "stroke-dasharray": each.dash })];
    const radius = each.kind === "path" ? 2.6 : 3.2, n = each.points.length;
    return [each.kind === "path" && s("path", { d: line(each.points), ...stroke, "stroke-width": 0.8, opacity: 0.45 }),
      each.points.map(([x, y], i) => s("circle", { cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: radius, fill: each.colour,
        opacity: each.kind === "path" ? (0.2 + 0.8 * i / n).toFixed(2) : 1 }))];
  });
  const named = series.filter(each => each.label);
  const legend = h("div", { class: "legend" });
  const label = at => legend.replaceChildren(...(at === null
    ? (named.length ? named.map(each => h("span", {}, h("i", { class: "dot", css: { background: each.colour, opacity: each.dash ? 0.55 : 1 } }), each.label)) : [unit])
    : [h("span", {}, `${x_unit} ${at}`), ...series.map(each => {
        const near = each.points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
        return h("span", {}, h("i", { class: "dot", css: { background: each.colour, opacity: each.dash ? 0.55 : 1 } }), number(near[1]));
      })]));
  label(null);
  const cursor = s("line", { class: "axis", y1: top, y2: H - bottom, visibility: "hidden" });
  const follow = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * W;
    const at = Math.round(x0 + (Math.min(Math.max(x, left), W - right) - left) / (W - left - right) * (x1 - x0));
    cursor.setAttribute("visibility", "visible"); cursor.setAttribute("x1", X(at)); cursor.setAttribute("x2", X(at));
    label(at);
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); label(null); };
  const path = series[0].kind === "path";
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title, onpointermove: path ? null : follow, onpointerleave: leave },
    ticks(y0, y1, 4).map(([y, label]) => [s("line", { class: "axis", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }),
      s("text", { x: left - 5, y: Y(y) + 3.5, "text-anchor": "end" }, label)]),
    ticks(x0, x1, 5).map(([x, label]) => s("text", { x: X(x), y: H - 9, "text-anchor": "middle" }, label)), cursor, drawn);
  return h("div", { class: "card" }, h("h3", {}, title), legend, svg);
}

function curves() {
  const titles = [...new Set(runs.flatMap(run => run.panels.map(panel => panel.title)))];
  const many = runs.length > 1;
  return titles.map(title => {
    const found = runs.map(run => run.panels.find(panel => panel.title === title));
    const series = found.flatMap((panel, i) => (panel ? panel.series : []).map((each, j) => ({
      ...each, colour: colour(many ? i : j), dash: many && j ? "4 3" : null,
      label: many ? [runs[i].name, each.label].filter(Boolean).join(": ") : each.label })));
    const panel = found.find(Boolean), path = panel.series.length && panel.series[0].kind === "path";
    return chart(title, panel.unit, series, path ? "KL" : runs[0].unit);
  }).filter(Boolean);
}

// --- tokens ---------------------------------------------------------------------------------------------------------

// name, what it says, the sign of what is drawn warm, whether a sum over tokens means something, what is drawn pale
const QUANTITIES = {
  kl: ["KL", "log π − log π₀ in nats. Warm: spent, the policy wants this token more than the reference did. Cool: earned back.", 1, true, 0],
  advantages: ["advantage", "whitened. Warm: blamed, the update makes it rarer. Cool: praised.", -1, true, 0],
  rewards: ["reward", "−β KL, and at the last token the score too. Warm: paid. Cool: received.", -1, true, 0],
  values: ["value", "what the value net expects of the rest, before this token. Warm: less than on average. Cool: more.", -1, false, null],
  returns: ["return", "what the value net learns to expect here. Warm: less than on average. Cool: more.", -1, false, null],
  ratio: ["ratio", "π in the last epoch ÷ π before the update. Warm: made rarer. Cool: made likelier.", -1, false, 1],
  logp: ["log π", "of the policy that sampled. Warm: a surprise.", -1, true, 0],
  ref_logp: ["log π₀", "of the frozen reference. Warm: a surprise to it.", -1, true, 0],
  entropy: ["entropy", "of the next-token distribution, in nats. Warm: undecided.", 1, false, 0],
};
const sum = list => list.reduce((total, x) => total + (finite(x) ? x : 0), 0);
const mean = list => sum(list) / (list.length || 1);
const scales = {};  // of each quantity: what is drawn pale, and the distance from it that is drawn in full colour

function prepare() {
  const answers = runs.flatMap(run => run.rollout ? run.rollout.answers : []);
  answers.forEach(each => { each.kl = each.logp.map((x, i) => x - each.ref_logp[i]); });
  for (const [key, [, , , , pale]] of Object.entries(QUANTITIES)) {
    const all = answers.flatMap(each => each[key] || []).filter(finite), centre = pale ?? mean(all);
    const far = all.map(x => Math.abs(x - centre)).sort((a, b) => a - b);
    scales[key] = [centre, far[Math.floor(far.length * 0.975)] || far.at(-1) || 1, far.length > 0];
  }
}

const tell = (key, x) => key === "ratio" && finite(x) ? x.toFixed(3) : number(x, key === "kl" || key === "advantages" || key === "rewards");

function paint(key, x) {
  const [centre, reach] = scales[key], t = Math.max(-1, Math.min(1, (x - centre) / reach)) * QUANTITIES[key][2];
  if (!finite(t) || Math.abs(t) < 0.03) return "transparent";
  return `color-mix(in oklab, var(${t > 0 ? "--hot" : "--cold"}) ${(8 + 66 * Math.abs(t)).toFixed(0)}%, transparent)`;
}

// A token is a text, the bytes of a part of a character, or {special: its name}.
const spelled = token => typeof token === "string" ? visible(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  : Array.isArray(token) ? token.map(byte => byte.toString(16).padStart(2, "0")).join(" ") : visible(token && token.special);
const token_name = token => typeof token === "string" ? spelled(token) : h("span", { class: "name" }, spelled(token));
function whole_character(tokens, i) {  // the character that a token of bytes is a part of
  const part = j => Array.isArray(tokens[j]);
  let first = i, last = i;
  while (part(first - 1)) first--;
  while (part(last + 1)) last++;
  return visible(new TextDecoder().decode(new Uint8Array(tokens.slice(first, last + 1).flat())));
}

function read_out(answer, i) {
  const token = answer.tokens[i], part = Array.isArray(token) ? ` (bytes in “${whole_character(answer.tokens, i)}”)` : "";
  const facts = Object.entries(QUANTITIES).filter(([key]) => answer[key]).map(([key, [name]]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, tell(key, answer[key][i]))));
  const p = h("div", {}, h("dt", {}, "probability under π, π₀"), h("dd", {}, `${number(Math.exp(answer.logp[i]))}, ${number(Math.exp(answer.ref_logp[i]))}`));
  document.getElementById("readout").replaceChildren(
    h("div", {}, h("code", { class: "text" }, `“${spelled(token)}”`), h("span", { class: "soft" }, `${part} token ${i + 1} of ${answer.tokens.length}`)),
    h("dl", {}, facts, p));
}

function select(span) {
  document.querySelectorAll(".tokens .at").forEach(each => each.classList.remove("at"));
  span.classList.add("at");
  span.dispatchEvent(new Event("pointerenter"));
}

function token_table(answer) {
  const keys = Object.keys(QUANTITIES).filter(key => answer[key]);
  const order = ["logp", "ref_logp", "kl", "rewards", "values", "advantages", "returns", "ratio", "entropy"].filter(key => keys.includes(key));
  const rows = answer.tokens.map((token, i) => h("tr", {}, h("td", {}, h("code", {}, token_name(token))),
    order.map(key => h("td", { css: { background: paint(key, answer[key][i]) } }, tell(key, answer[key][i])))));
  const sums = order.map(key => h("td", {}, QUANTITIES[key][3] ? tell(key, sum(answer[key])) : `mean ${tell(key, mean(answer[key]))}`));
  return h("div", { class: "scroll" }, h("table", { class: "sticky" },
    h("thead", {}, h("tr", {}, h("th", {}, "token"), order.map(key => h("th", {}, QUANTITIES[key][0])))),
    h("tbody", {}, rows), h("tfoot", {}, h("tr", {}, h("td", {}, "sum"), sums))));
}

const SORTS = { score: a => a.score, KL: a => sum(a.kl), length: a => a.tokens.length, "worst token": a => Math.max(...a.kl), "as sampled": (a, i) => -i };

function answer_card(answer, number_of, rollout) {
  const spans = answer.tokens.map((token, i) => {
    const key = JSON.stringify(token), enter = () => read_out(answer, i);
    const span = h("span", { class: [typeof token === "string" ? "" : "name", key === view.alike ? "alike" : ""].join(" ").trim() || null,
      "data-x": view.numbers ? tell(view.colour, answer[view.colour][i]) : null, css: { background: paint(view.colour, answer[view.colour][i]) },
      onpointerenter: enter, onclick: event => select(event.currentTarget) }, spelled(token).replace(/^ +(?=.)/, "").replace(/^ +$/, blank => "␣".repeat(blank.length)));
    const space = typeof token === "string" && /^ +(?=.)/.exec(token);  // outside, so that a line breaks there
    return [space && space[0], span, typeof token === "string" && /[\n\r\u2028\u2029]/.test(token) && h("br")];
  });
  const kl = sum(answer.kl), open = view.open.has(number_of), fact = (name, value) => h("span", {}, h("span", { class: "soft" }, `${name} `), h("b", {}, value));
  return h("article", { class: "card answer" },
    h("header", {}, fact("score", number(answer.score, true)), fact("KL", number(kl)), fact("tokens", answer.tokens.length),
      fact("score − β KL", number(answer.final_score - rollout.kl_coef * kl, true)), !answer.ended && h("span", { class: "name" }, "did not end"),
      h("button", { type: "button", "aria-expanded": String(open), onclick: () => { view.open[open ? "delete" : "add"](number_of); draw("tokens"); } }, open ? "hide the table" : "table")),
    h("div", { class: "soft" }, text(answer.prompt, "(empty prompt)")),
    h("div", { class: "tokens" }, spans), open && token_table(answer));
}

// Where a quantity went: its mean at each position, and the tokens with the most of it.
function where(rollout) {
  const [name, , , additive] = QUANTITIES[view.colour], [centre] = scales[view.colour], answers = rollout.answers;
  const by_position = [], by_token = new Map();
  answers.forEach(answer => answer.tokens.forEach((token, i) => {
    const x = answer[view.colour][i], key = JSON.stringify(token);
    (by_position[i] ||= []).push(x);
    if (!by_token.has(key)) by_token.set(key, [token, []]);
    by_token.get(key)[1].push(x);
  }));
  const points = by_position.map((list, i) => [i + 1, mean(list), list.length]).filter(each => each[2] >= answers.length / 20).map(each => each.slice(0, 2));
  const weight = list => Math.abs(additive ? sum(list) : mean(list) - centre);
  const top = [...by_token.values()].filter(each => additive || each[1].length >= Math.min(5, answers.length)).sort((a, b) => weight(b[1]) - weight(a[1])).slice(0, 9);
  const most = Math.max(...top.map(each => weight(each[1])));
  const rows = top.map(([token, list]) => h("tr", { onclick: () => { const key = JSON.stringify(token); view.alike = view.alike === key ? null : key; draw("tokens"); } },
    h("td", {}, token_name(token)), h("td", {}, list.length), h("td", {}, number(additive ? sum(list) : mean(list), true)),
    h("td", { css: { width: "45%" } }, h("i", { css: { width: `${100 * weight(list) / most}%`, background: paint(view.colour, (additive ? sum(list) : mean(list) - centre) > 0 ? 1e9 : -1e9) } }))));
  return h("div", { class: "grid wide" }, chart(`${name} by position`, "mean over the answers", [{ label: "", kind: "line", points, colour: colour(0) }], "token", innerWidth < 700 ? 340 : 560),
    h("div", { class: "card" }, h("h3", {}, additive ? `tokens with the most ${name}, summed over ${answers.length} answers` : `tokens furthest from the mean ${name}`),
      h("table", { class: "bars", css: { width: "100%" } }, h("thead", {}, h("tr", {}, ["token", "times", additive ? "sum" : "mean", ""].map(x => h("th", {}, x)))), h("tbody", {}, rows))));
}

function tokens() {
  const able = runs.map((run, i) => i).filter(i => runs[i].rollout && runs[i].rollout.answers.length);
  if (!able.length) return [];
  if (!able.includes(view.run)) view.run = able[0];
  const run = runs[view.run], { answers, iteration, kl_coef } = run.rollout, set = change => { Object.assign(view, change); draw("tokens"); };
  const [name, meaning, warm] = QUANTITIES[view.colour], [centre, reach] = scales[view.colour];
  const value = SORTS[view.sort], order = answers.map((answer, i) => [value(answer, i), i]).sort((a, b) => (view.down ? b[0] - a[0] : a[0] - b[0]) || a[1] - b[1]).map(each => each[1]);
  const ends = warm > 0 ? ["--cold", "--hot"] : ["--hot", "--cold"];
  const scale = h("span", { class: "scale" }, number(centre - reach), h("i", { css: { background: `linear-gradient(90deg, color-mix(in oklab, var(${ends[0]}) 74%, transparent), transparent, color-mix(in oklab, var(${ends[1]}) 74%, transparent))` } }), number(centre + reach));
  return [h("h2", {}, "Token by token"),
    h("p", { class: "soft" }, `The ${answers.length} answers of iteration ${iteration}, β = ${number(kl_coef)}: where the KL was spent, and where blame fell.`),
    able.length > 1 && h("div", { class: "row" }, h("div", { class: "choice" }, h("span", {}, "run"), able.map(i => button(runs[i].name, i === view.run, () => set({ run: i, shown: 12 }))))),
    h("div", { id: "tools" },
      h("div", { class: "row" }, h("div", { class: "choice" }, h("span", {}, "colour"), Object.entries(QUANTITIES).filter(([key]) => scales[key][2]).map(([key, [label]]) => button(label, key === view.colour, () => set({ colour: key })))), scale),
      h("div", { class: "row" }, h("div", { class: "choice" }, h("span", {}, "sort"), Object.keys(SORTS).map(key => button(key === view.sort ? `${key} ${view.down ? "↓" : "↑"}` : key, key === view.sort,
        () => set(key === view.sort ? { down: !view.down } : { sort: key, down: true })))), button("numbers", view.numbers, () => set({ numbers: !view.numbers })))),
    h("p", { class: "soft" }, h("b", {}, name), `: ${meaning}`), where(run.rollout),
    h("div", { class: view.numbers ? "numbers" : null, id: "answers" }, order.slice(0, view.shown).map(i => answer_card(answers[i], i, run.rollout))),
    order.length > view.shown && h("div", { class: "row" }, h("button", { type: "button", onclick: () => set({ shown: view.shown + 24 }) }, `show more (${order.length - view.shown} left)`)),
    h("div", { id: "readout" }, h("span", { class: "soft" }, "Point at a token, or tap it; ← and → go on from there."))];
}

addEventListener("keydown", event => {
  const at = document.querySelector(".tokens .at"), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const all = at && step ? [...at.parentNode.querySelectorAll("span")] : [], next = all[all.indexOf(at) + step];
  if (next) { event.preventDefault(); select(next); }
});

// --- report, samples, options ---------------------------------------------------------------------------------------

const short = name => visible(name).replace(/^.*:/, "");
const pair = ([x, error]) => `${number(x)} ± ${number(error)}`;
const key = run => runs.length > 1 && h("i", { class: "dot", css: { background: colour(runs.indexOf(run)) } });

function head() {
  const many = runs.length > 1, [run] = runs, { config, report, last } = run;
  const tile = (name, value, more) => h("div", { class: "card tile" }, h("span", { class: "soft" }, name), h("b", {}, value), h("span", { class: "soft" }, more || ""));
  const table = report && report.table ? Object.entries(report.table) : [];
  const tiles = many ? [] : [...table.slice(0, 4).map(([name, row]) => tile(short(name), `${number(row.before[0])} → ${number(row.after[0])}`, `${row.change[0] > 0 ? "+" : ""}${pair(row.change)}`)),
    report && report.win_rate && tile("wins against the start", `${(100 * report.win_rate[0]).toFixed(1)}%`, `by ${short(report.by)}, ties half`),
    report && report.metrics && tile("held-out accuracy", number(report.metrics["eval/accuracy"]), `± ${number(report.metrics["eval/accuracy_se"])}`),
    !report && finite(last["loss/held_out"]) && tile("held-out loss", number(last["loss/held_out"]), "nats a token"),
    tile(`${run.unit}s`, number(run.steps), config ? `${clock(config.seconds)} on ${config.device}` : "")];
  return [h("h1", {}, many ? runs.map((each, i) => h("span", { css: { marginRight: "1.2rem" } }, key(each), visible(each.name))) : visible(run.name)),
    h("p", { class: "soft", id: "status" }, many ? "runs side by side" : config ? h("code", {}, visible(config.command)) : ""), h("div", { class: "grid tiles" }, tiles)];
}

function report() {
  const able = runs.filter(run => run.report && run.report.table), parts = [];
  if (able.length) {
    const names = [...new Set(able.flatMap(run => Object.keys(run.report.table)))], one = able.length === 1;
    const row = (label, cells) => h("tr", {}, h("td", {}, label), cells.map(cell => h("td", {}, cell)));
    const cells = name => able.flatMap(({ report: { table } }) => !table[name] ? [one ? ["–", "–", "–"] : "–"].flat() : one ? [pair(table[name].before), pair(table[name].after), pair(table[name].change)]
      : [`${number(table[name].before[0])} → ${pair(table[name].after)}`]);
    parts.push(h("div", { class: "card scroll" }, h("table", { class: "sticky" },
      h("thead", {}, h("tr", {}, h("th", {}, "held-out prompts"), (one ? ["before", "after", "change"] : able.map(run => [key(run), visible(run.name)])).map(x => h("th", {}, x)))),
      h("tbody", {}, names.map(name => row(short(name), cells(name))), row("wins against the start", able.flatMap(run => one ? ["", pair(run.report.win_rate), ""] : [pair(run.report.win_rate)]))))));
    const facts = answer => Object.entries(answer).filter(([name, x]) => finite(x)).slice(0, 3).map(([name, x]) => `${short(name).replace(/ .*/, "")} ${number(x)}`).join(", ");
    const side = (label, answer) => h("div", { class: "card" }, h("div", { class: "soft" }, h("b", {}, label), answer ? ` · ${facts(answer)}` : ""), answer ? text(answer.text.trim()) : "–");
    const cards = able[0].report.answers.map(first => h("div", {}, h("p", { css: { marginTop: "1rem" } }, h("b", {}, text(first.prompt, "(empty prompt)"))), h("div", { class: "grid wide", css: { marginTop: ".3rem" } },
      side("before", first.before), able.map(run => { const same = run.report.answers.find(each => each.prompt === first.prompt); return side([key(run), one ? "after" : visible(run.name)], same && same.after); }))));
    parts.push(h("div", { id: "pairs" }, cards.slice(0, 6)), cards.length > 6 && h("details", {}, h("summary", {}, `${cards.length - 6} more prompts`), cards.slice(6)));
  }
  runs.filter(run => run.report && run.report.calibration).forEach(run => parts.push(h("div", { class: "grid" }, chart(`${run.name}: predicted and observed win rate`, "observed share, held out",
    [{ label: "", kind: "line", points: [[0, 0], [1, 1]], colour: "var(--soft)", dash: "3 3" }, { label: "", kind: "dots", points: run.report.calibration.map(row => [row[3], row[4]]), colour: colour(0) }], "predicted"))));
  return parts.length ? [h("h2", {}, able.length ? "Before and after" : "Held out"), parts] : [];
}

function samples() {
  const able = runs.filter(run => run.samples.length);
  if (!able.length) return [];
  const list = run => h("div", { class: "card" }, runs.length > 1 && h("h3", {}, key(run), visible(run.name)), run.samples.map(each => h("p", {}, h("span", { class: "soft" }, `${run.unit} ${each.step}  `), text(each.text))));
  return [h("h2", {}, "Samples over time"), h("div", { class: runs.length > 1 ? "grid wide" : "" }, able.map(list))];
}

function options() {
  const able = runs.filter(run => run.config);
  if (!able.length) return [];
  const facts = able.map(({ config: { options, ...more } }) => ({ ...more, ...Object.fromEntries(Object.entries(options).map(([name, x]) => [`--${name}`, x])) }));
  const names = [...new Set(facts.flatMap(Object.keys))], say = x => x === null || x === undefined ? "–" : x === "" ? "(empty)" : visible(x);
  const differs = name => new Set(facts.map(each => JSON.stringify(each[name]))).size > 1;
  const is_option = name => name.startsWith("--"), list = some => h("dl", { class: "facts" }, some.map(name => h("div", {}, h("dt", {}, name), h("dd", {}, say(facts[0][name])))));
  const table = some => h("div", { class: "scroll" }, h("table", { class: "sticky" }, h("thead", {}, h("tr", {}, h("th", {}, ""), able.map(run => h("th", {}, key(run), visible(run.name))))),
    h("tbody", {}, some.map(name => h("tr", { class: differs(name) ? "differs" : null }, h("td", {}, name), facts.map(each => h("td", {}, h("code", {}, say(each[name])))))))));
  const unlike = names.filter(differs), about = names.filter(name => !differs(name) && !is_option(name)), rest = names.filter(name => !differs(name) && is_option(name));
  return [h("h2", {}, "What the run was"), unlike.length ? [h("p", { class: "soft" }, "What differs:"), h("div", { class: "card" }, table(unlike))] : null,
    h("div", { class: "card", css: { marginTop: ".7rem" } }, list(about)),
    h("details", { open: runs.length === 1 }, h("summary", {}, `${rest.length} options${unlike.length ? " that are the same" : ""}`), h("div", { class: "card" }, list(rest)))];
}

// --- the page -------------------------------------------------------------------------------------------------------

const SECTIONS = { head: ["", head], curves: ["Curves", () => [h("h2", {}, "Curves"), h("div", { class: "grid" }, curves())]], tokens: ["Tokens", tokens],
  report: ["Before and after", report], samples: ["Samples", samples], options: ["Options", options] };
const draw = name => document.getElementById(name).replaceChildren(...[SECTIONS[name][1]()].flat(9).filter(Boolean));

function draw_all() {
  prepare();
  document.title = runs.map(run => run.name).join(", ");
  Object.keys(SECTIONS).forEach(draw);
  const there = Object.entries(SECTIONS).filter(([name, [label]]) => label && document.getElementById(name).childNodes.length);
  document.getElementById("nav").replaceChildren(...there.map(([name, [label]]) => h("a", { href: `#${name}` }, label)), h("button", { type: "button", "aria-label": "light or dark", onclick: () => {
    view.dark = !(view.dark ?? matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.style.colorScheme = view.dark ? "dark" : "light";
  } }, "◐"));
}

document.getElementById("main").append(...Object.keys(SECTIONS).map(id => h("section", { id })));
draw_all();
let version = "";
async function follow() {
  try {
    const reply = await fetch(`runs?${version}`);
    if (reply.status === 200) { ({ runs, version } = await reply.json()); draw_all(); }
  } catch { document.title = "no answer"; }
  setTimeout(follow, 2000);
}
if (watched) follow();
