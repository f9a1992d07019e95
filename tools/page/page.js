"use strict";
// Everything that is shown is drawn from `runs`, of which each is a run folder (see __init__.py). curves.js and
// tokens.js, which draw two of the sections, follow in the same script.

const { watched, ...first } = JSON.parse(document.getElementById("content").textContent);
let runs = first.runs;

// --- elements -------------------------------------------------------------------------------------------------------

// Elements are made of text alone: nothing of a run is ever read as HTML.
function make(space, tag, attributes, children) {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "css") Object.assign(element.style, value);
    else if (name.startsWith("on")) { if (value) element.addEventListener(name.slice(2), value); }
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const div = (name, ...children) => h("div", { class: name }, ...children);
const soft = (...children) => h("span", { class: "soft" }, ...children);
const button = (label, pressed, click) =>
  h("button", { type: "button", "aria-pressed": pressed === null ? null : String(pressed), onclick: click }, label);
const row = (cells, name = null) => h("tr", { class: name }, cells.map(cell => h("td", {}, cell)));
const table = (names, rows, foot) => div("scroll", h("table", { class: "sticky" },
  h("thead", {}, h("tr", {}, names.map(name => h("th", {}, name)))), h("tbody", {}, rows), foot));

// Control characters, and those that turn the direction of a line, are shown by their numbers.
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
const numbered = character => `⟨U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const visible = content => String(content ?? "").replace(/\r\n?|[\u2028\u2029]/g, "\n").replace(CONTROLS, numbered);
const text = (content, empty = "(empty)") => h("span", { class: "text" }, visible(content) || soft(empty));

// --- numbers --------------------------------------------------------------------------------------------------------

const finite = x => typeof x === "number" && Number.isFinite(x);
const sum = list => list.reduce((total, x) => total + (finite(x) ? x : 0), 0);
const mean = list => sum(list) / (list.length || 1);

function number(x, signed = false) {
  if (!finite(x)) return "–";
  const size = Math.abs(x), sign = signed && x > 0 ? "+" : x < 0 ? "−" : "";
  if (size < 5e-5) return "0";
  if (Number.isInteger(x) || size >= 1000) return sign + size.toLocaleString("en", { maximumFractionDigits: 0 });
  return sign + size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.01 ? 3 : 4);
}

// A measure is [mean, error or null] or [share, low, high]. Its digits are those that the error leaves, alike in a row.
function digits_of(measures) {
  const errors = measures.map(([, low, high]) => high === undefined ? low : (high - low) / 2).filter(x => x > 0);
  const digits = errors.map(x => (x.toExponential()[0] === "1") - Math.floor(Math.log10(x))); // one, of 0.012 two
  return errors.length ? Math.max(0, Math.min(4, Math.max(...digits))) : 3;
}
const fixed = (x, digits, sign = "") => (x < 0 ? "−" : x > 0 ? sign : "") + Math.abs(x).toFixed(digits);
function pair(measure, n, digits = digits_of([measure]), sign = "") {
  const [x, ...ends] = measure.map((each, i) => finite(each) ? fixed(each, digits, i ? "" : sign) : null);
  return ends.length > 1 ? `${x} [${ends[0]}, ${ends[1]}]` : ends[0] ? `${x} ± ${ends[0]}` : `${x} (n ${n})`;
}

function clock(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// --- runs -----------------------------------------------------------------------------------------------------------

const WINS = "wins against the reference";
const short = name => visible(name).replace(/^.*:/, ""); // a judge without its file
const colour = i => `var(--c${i % 10})`;
const sample = (shade, kind, dash) =>
  h("i", { class: kind === "line" ? `line${dash ? " dashed" : ""}` : "dot", css: { color: shade } });
const colour_of = run => colour(groups().findIndex(group => group.includes(run)));
const titled = run => [groups().length > 1 && sample(colour_of(run)), visible(run.name)];

function groups() { // runs that differ in seed and folder alone: they share a colour, and the curves show a band
  const found = new Map();
  for (const run of runs) {
    const key = run.config ? JSON.stringify([run.config.stage, { ...run.config.options, seed: 0, out: 0 }]) : run.name;
    found.set(key, [...found.get(key) ?? [], run]);
  }
  return [...found.values()];
}

// What a run was, with its options as they are written; not what the time left is counted from.
function facts_of({ config: { options, inputs, steps, started, first_step, ...about } }) {
  return { ...about, ...Object.fromEntries(Object.entries(options).map(([name, x]) => [`--${name}`, x])) };
}
const said = x => x === null || x === undefined ? "–" : x === "" ? "(empty)" : visible(x);

function differing(able) {
  const facts = able.map(facts_of);
  const names = [...new Set(facts.flatMap(Object.keys))];
  const unlike = names.filter(name => new Set(facts.map(each => JSON.stringify(each[name]))).size > 1);
  return unlike.sort((a, b) => b.startsWith("--") - a.startsWith("--"));
}

// --- sections -------------------------------------------------------------------------------------------------------

function head() {
  if (runs.length === 1) return head_of(runs[0]);
  const able = runs.filter(run => run.config);
  const all = differing(able), mixed = all.includes("stage");
  const unlike = all.filter(name => mixed ? name === "stage" : name.startsWith("--") && name !== "--out");
  const each = run => unlike.map(name => `${name} ${said(facts_of(run)[name])}`).join("  ");
  const reported = runs.filter(run => run.report?.table);
  return [
    h("h1", {}, runs.map(run => h("span", { class: "run" }, titled(run)))),
    able.map(run => h("p", {}, titled(run), " ", h("code", { class: "soft" }, each(run)))),
    reported.length > 0 && div("grid wide", div("card", report_table(reported))),
  ];
}

function head_of(run) {
  const { config, report, last } = run, tiles = [];
  const tile = (name, value, more) => tiles.push(div("card tile", soft(name), h("b", {}, value), soft(more)));
  const table = report?.table ?? {}, capped = `${table["final score"]?.change}` !== `${table.score?.change}`;
  const rows = Object.entries(table).slice(0, 5).filter(([name]) => name !== "final score" || capped);
  for (const [name, { before, after, change }] of rows) {
    const digits = digits_of([before, after, change]), [from, to] = [before, after].map(([x]) => fixed(x, digits));
    tile(short(name), `${from} → ${to}`, pair(change, report.answers.length, digits, "+"));
  }
  if (report?.win_rate) tile(WINS, number(report.win_rate[0]), `by ${short(report.by)}, ties half`);
  const found = end => report?.metrics?.[`eval/accuracy${end}`];
  const [accuracy, low, high, ceiling] = ["", "_low", "_high", "_ceiling"].map(found);
  const allowed = finite(ceiling) ? `of ${fixed(ceiling, 3)} that the noise in the labels allows` : "";
  const interval = finite(low) ? `95%: ${fixed(low, 3)} to ${fixed(high, 3)}, ` : "";
  if (finite(accuracy)) tile("held-out accuracy", fixed(accuracy, 3), interval + allowed);
  if (finite(last["loss/held_out"])) tile("held-out loss", number(last["loss/held_out"]), "nats per token");
  if (finite(last["eval/loss"])) tile("held-out loss", number(last["eval/loss"]), "nats per comparison");
  tile(`${run.unit}s`, number(run.steps), config ? `${clock(config.seconds)} on ${visible(config.device)}` : "");
  const command = config && h("code", { class: "soft" }, visible(config.command));
  return [h("h1", {}, visible(run.name)), h("p", {}, command), div("grid tiles", tiles)];
}

function report() {
  const able = runs.filter(run => run.report?.table);
  const measured = runs.filter(run => run.report?.calibration);
  if (!able.length && !measured.length) return [];
  return [
    h("h2", {}, able.length ? "Before and after" : "Held out"),
    able.length > 0 && [runs.length === 1 && div("card", report_table(able)), side_by_side(able)],
    div("grid", measured.map(reliability)),
  ];
}

function report_table(able) {
  const names = [...new Set(able.flatMap(run => Object.keys(run.report.table)))];
  if (runs.length === 1) {
    const { table: found, win_rate, answers: { length } } = able[0].report;
    const cells = ({ before, after, change }, digits = digits_of([before, after, change])) =>
      [pair(before, length, digits), pair(after, length, digits), pair(change, length, digits, "+")];
    const rows = names.map(name => row([short(name), ...cells(found[name])]));
    return table(["held-out prompts", "before", "after", "change"],
      [...rows, row([WINS, "", pair(win_rate), ""])]);
  }
  const digits = names.map(name => digits_of(able.map(run => run.report.table[name]?.after ?? [])));
  const cell = ({ table: found, answers }, name, i) =>
    found[name] ? pair(found[name].after, answers.length, digits[i]) : "–";
  const cells = found => [...names.map((name, i) => cell(found, name, i)), pair(found.win_rate)];
  const rows = able.map(run => row([titled(run), ...cells(run.report)]));
  return table(["after", ...names.map(short), WINS], rows);
}

function side_by_side(able) { // the answers of all runs to the same held-out prompts
  const numbers = answer => Object.entries(answer).filter(([, x]) => finite(x)).slice(0, 3)
    .map(([name, x]) => `${short(name).replace(/ .*/, "")} ${number(x)}`).join(", ");
  const side = (label, answer) => div("card",
    h("div", {}, h("b", {}, label), answer && soft(` · ${numbers(answer)}`)),
    answer ? text(answer.text.trim()) : soft("not asked"));
  const prompts = able[0].report.answers.map(asked => {
    const same = run => run.report.answers.find(answer => answer.prompt === asked.prompt)?.after;
    const sides = able.map(run => side(able.length > 1 ? titled(run) : "after", same(run)));
    return h("div", {}, h("h3", { class: "asked" }, text(asked.prompt, "(empty prompt)")),
      div("grid wide", side("before", asked.before), sides));
  });
  const more = fold("more", `${prompts.length - 6} more prompts`, false, prompts.slice(6));
  return [h("div", { id: "pairs" }, prompts.slice(0, 6)), prompts.length > 6 && more];
}

function reliability(run) {
  const shade = colour_of(run), bins = run.report.calibration;
  const points = bins.map(([, , , predicted, observed]) => [predicted, observed]);
  const intervals = bins.map(([, , , predicted, , ...ends]) => ( // of 95%, where the prompts are enough
    { kind: "line", points: ends.map(end => [predicted, end]), colour: shade }));
  const diagonal = { kind: "line", dash: "3 3", points: [[0, 0], [1, 1]], colour: "var(--soft)" };
  const series = [diagonal, ...intervals, { kind: "dots", points, colour: shade }];
  const whose = runs.length > 1 ? `, ${visible(run.name)}` : "";
  const title = `predicted and observed win rate${whose}`;
  return chart({ title, unit: "observed, held out", x: "predicted", still: true, series });
}

function samples() {
  const able = runs.filter(run => run.samples.length);
  if (!able.length) return [];
  const list = run => div("card", runs.length > 1 && h("h3", {}, titled(run)),
    run.samples.map(({ step, text: content }) => h("p", {}, soft(`${run.unit} ${step}  `), text(content))));
  return [h("h2", {}, "Samples over time"), div(able.length > 1 ? "grid wide" : "", able.map(list))];
}

function options() {
  const able = runs.filter(run => run.config);
  if (!able.length) return [];
  const facts = able.map(facts_of), unlike = differing(able);
  const alike = Object.keys(facts[0]).filter(name => !unlike.includes(name));
  const list = names => h("dl", { class: "facts card" },
    names.map(name => h("div", {}, h("dt", {}, visible(name)), h("dd", {}, said(facts[0][name])))));
  const chosen = alike.filter(name => name.startsWith("--"));
  const rows = able.map((run, i) => row([titled(run), ...unlike.map(name => h("code", {}, said(facts[i][name])))]));
  return [
    h("h2", {}, "What the run was"),
    unlike.length > 0 && [h("p", {}, soft("What differs:")), div("card differs",
      table(["", ...unlike.map(visible)], rows))],
    list(alike.filter(name => !name.startsWith("--"))),
    fold("options", `${chosen.length} options${unlike.length ? " that are the same" : ""}`, runs.length === 1,
      list(chosen)),
  ];
}

function fold(key, summary, open, ...content) { // stays as it was left when the page is drawn anew
  const turn = event => view.folds.set(key, event.currentTarget.open);
  const shown = view.folds.get(key) ?? open ? "" : null;
  return h("details", { open: shown, ontoggle: turn }, h("summary", {}, summary), content);
}

// --- the page -------------------------------------------------------------------------------------------------------

const SECTIONS = { head, curves, tokens, report, samples, options };
const LINKS = { curves: "Curves", tokens: "Tokens", report: "Report", samples: "Samples", options: "Options" };
function draw(name) {
  const section = document.getElementById(name), all = () => [...section.querySelectorAll("button, summary, [tabindex]")];
  const at = all().indexOf(document.activeElement);
  section.replaceChildren(...SECTIONS[name]().flat(9).filter(Boolean));
  all()[at]?.focus({ preventScroll: true }); // who goes by keyboard goes on from there
  if (name === "tokens" && view.at) select(document.getElementById(view.at[0])?.querySelectorAll("span")[view.at[1]]);
}

// What a section is drawn from: as long as it is the same, the section stays as it is.
const SOURCES = { head: run => run, curves: run => run.panels, tokens: run => [run.rollout, run.report?.pairs] };
const drawn_from = {};

function draw_all() {
  document.title = runs.map(run => run.name).join(", ");
  for (const name of Object.keys(SECTIONS)) {
    const source = JSON.stringify(runs.map(SOURCES[name] ?? (run => [run.config, run.report, run.samples])));
    if (drawn_from[name] === source) continue;
    drawn_from[name] = source;
    draw(name);
  }
  const there = Object.entries(LINKS).filter(([name]) => document.getElementById(name).childNodes.length);
  const links = there.map(([name, label]) => h("a", { href: `#${name}` }, label));
  const theme = h("button", { type: "button", "aria-label": "light or dark", onclick: other_theme }, "◐");
  document.getElementById("nav").replaceChildren(...links, h("span", { id: "live", role: "status" }, live), theme);
}

function progress({ config, steps, since_start }) {
  const { steps: all, first_step: first } = config ?? {};
  if (!steps) return "no step yet";
  if (!all || steps >= all) return `${steps}${all ? ` of ${all}, all done` : ""}`;
  const left = since_start / (steps - first) * (all - steps);
  return `${steps} of ${all}, ${Math.floor(left / 60)}:${String(Math.floor(left % 60)).padStart(2, "0")} left`;
}

function other_theme() {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
}

let version = "", live = "", answered = new Date();
async function follow() {
  try {
    const reply = await fetch(`${location.pathname.replace(/\/?$/, "/")}runs?${version}`);
    if (reply.status === 200) {
      ({ runs, version } = await reply.json());
      draw_all();
    }
    live = reply.status > 204 ? await reply.text() : runs.map(progress).join("; ");
    answered = new Date();
  } catch {
    live = `no answer since ${answered.toTimeString().slice(0, 5)}`;
  }
  document.getElementById("live").replaceChildren(live);
  setTimeout(follow, 2000);
}

function start() {
  document.getElementById("main").append(...Object.keys(SECTIONS).map(id => h("section", { id })));
  draw_all();
  if (watched) follow();
}
