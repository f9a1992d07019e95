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
const pair = ([x, error, high], n) => high !== undefined ? `${number(x)} [${number(error)}, ${number(high)}]`
  : finite(error) ? `${number(x)} ± ${number(error)}` : `${number(x)} (n ${n})`; // an interval, or an error if known

function clock(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// --- runs -----------------------------------------------------------------------------------------------------------

const WINS = "wins against the reference";
const short = name => visible(name).replace(/^.*:/, ""); // a judge without its file
const colour = i => `var(--c${i % 5})`;
const dot = (shade, pale) => h("i", { class: "dot", css: { background: shade, opacity: pale ? 0.5 : 1 } });
const titled = run => [runs.length > 1 && dot(colour(runs.indexOf(run))), visible(run.name)];

function facts_of({ config: { options, ...about } }) { // what a run was, with its options as they are written
  return { ...about, ...Object.fromEntries(Object.entries(options).map(([name, x]) => [`--${name}`, x])) };
}
const said = x => x === null || x === undefined ? "–" : x === "" ? "(empty)" : visible(x);

function differing(able) {
  const facts = able.map(facts_of);
  const names = [...new Set(facts.flatMap(Object.keys))];
  return names.filter(name => new Set(facts.map(each => JSON.stringify(each[name]))).size > 1);
}

// --- sections -------------------------------------------------------------------------------------------------------

function head() {
  if (runs.length === 1) return head_of(runs[0]);
  const able = runs.filter(run => run.config);
  const unlike = differing(able).filter(name => name.startsWith("--") && name !== "--out");
  const each = run => unlike.map(name => `${name} ${said(facts_of(run)[name])}`).join("  ");
  return [
    h("h1", {}, runs.map(run => h("span", { class: "run" }, titled(run)))),
    able.map(run => h("p", {}, titled(run), " ", h("code", { class: "soft" }, each(run)))),
  ];
}

function head_of(run) {
  const { config, report, last } = run, tiles = [];
  const tile = (name, value, more) => tiles.push(div("card tile", soft(name), h("b", {}, value), soft(more)));
  for (const [name, { before, after, change }] of Object.entries(report?.table ?? {}).slice(0, 5)) {
    const sign = change[0] > 0 ? "+" : "";
    tile(short(name), `${number(before[0])} → ${number(after[0])}`, sign + pair(change, report.answers.length));
  }
  if (report?.win_rate) tile(WINS, number(report.win_rate[0]), `by ${short(report.by)}, ties half`);
  const { "eval/accuracy": accuracy, "eval/accuracy_low": low, "eval/accuracy_high": high } = report?.metrics ?? {};
  if (finite(accuracy)) tile("held-out accuracy", number(accuracy), finite(low) && `95%: ${number(low)} to ${number(high)}`);
  if (finite(last["loss/held_out"])) tile("held-out loss", number(last["loss/held_out"]), "nats per token");
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
    able.length > 0 && [div("card", report_table(able)), side_by_side(able)],
    div("grid", measured.map(reliability)),
  ];
}

function report_table(able) {
  const names = [...new Set(able.flatMap(run => Object.keys(run.report.table)))];
  if (able.length === 1) {
    const { table: found, win_rate, answers } = able[0].report;
    const cells = name => ["before", "after", "change"].map(column => pair(found[name][column], answers.length));
    const rows = names.map(name => row([short(name), ...cells(name)]));
    return table(["held-out prompts", "before", "after", "change"],
      [...rows, row([WINS, "", pair(win_rate), ""])]);
  }
  const cell = ({ table: found, answers }, name) =>
    found[name] ? `${number(found[name].before[0])} → ${pair(found[name].after, answers.length)}` : "–";
  const rows = names.map(name => row([short(name), ...able.map(run => cell(run.report, name))]));
  return table(["held-out prompts", ...able.map(titled)],
    [...rows, row([WINS, ...able.map(run => pair(run.report.win_rate))])]);
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
  const more = h("details", {}, h("summary", {}, `${prompts.length - 6} more prompts`), prompts.slice(6));
  return [h("div", { id: "pairs" }, prompts.slice(0, 6)), prompts.length > 6 && more];
}

function reliability(run) {
  const points = run.report.calibration.map(([, , , predicted, observed]) => [predicted, observed]);
  const diagonal = { kind: "line", points: [[0, 0], [1, 1]], colour: "var(--soft)", dash: "3 3" };
  const series = [diagonal, { kind: "dots", points, colour: colour(runs.indexOf(run)) }];
  return chart("predicted and observed win rate", "observed, held out", series, "predicted");
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
  const cells = name => facts.map(each => h("code", {}, said(each[name])));
  const rows = unlike.map(name => row([visible(name), ...cells(name)], "differs"));
  return [
    h("h2", {}, "What the run was"),
    unlike.length > 0 && [h("p", {}, soft("What differs:")), div("card", table(["", ...able.map(titled)], rows))],
    list(alike.filter(name => !name.startsWith("--"))),
    h("details", { open: runs.length === 1 ? "" : null },
      h("summary", {}, `${chosen.length} options${unlike.length ? " that are the same" : ""}`), list(chosen)),
  ];
}

// --- the page -------------------------------------------------------------------------------------------------------

const SECTIONS = { head, curves, tokens, report, samples, options };
const LINKS = { curves: "Curves", tokens: "Tokens", report: "Report", samples: "Samples", options: "Options" };
const draw = name => document.getElementById(name).replaceChildren(...SECTIONS[name]().flat(9).filter(Boolean));

function draw_all() {
  prepare();
  document.title = runs.map(run => run.name).join(", ");
  Object.keys(SECTIONS).forEach(draw);
  const there = Object.entries(LINKS).filter(([name]) => document.getElementById(name).childNodes.length);
  const links = there.map(([name, label]) => h("a", { href: `#${name}` }, label));
  const theme = h("button", { type: "button", "aria-label": "light or dark", onclick: other_theme }, "◐");
  document.getElementById("nav").replaceChildren(...links, theme);
}

function other_theme() {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
}

let version = "";
async function follow() {
  try {
    const reply = await fetch(`${location.pathname.replace(/\/?$/, "/")}runs?${version}`);
    if (reply.status === 200) {
      ({ runs, version } = await reply.json());
      draw_all();
    }
  } catch {
    document.title = "no answer from tools.page";
  }
  setTimeout(follow, 2000);
}

function start() {
  document.getElementById("main").append(...Object.keys(SECTIONS).map(id => h("section", { id })));
  draw_all();
  if (watched) follow();
}
