// Token by token: the last rollout, where the KL was spent and where blame fell; or pairs that a reward model scored.

const QUANTITIES = {
  kl: {
    name: "KL", warm: 1, adds_up: true, pale: 0,
    meaning: "log π − log π₀ in nats. Warm: spent, the policy wants it more than the reference. Cool: earned back.",
  },
  advantages: {
    name: "advantage", warm: -1, adds_up: true, pale: 0,
    meaning: "whitened. Warm: blamed, the update makes it rarer. Cool: praised.",
  },
  rewards: {
    name: "reward", warm: -1, adds_up: true, pale: 0,
    meaning: "−β KL, and at the last token the score too. Warm: paid. Cool: received.",
  },
  values: {
    name: "value", warm: -1, adds_up: false, pale: null,
    meaning: "what the value net expects of the rest, before this token. Warm: less than on average. Cool: more.",
  },
  returns: {
    name: "return", warm: -1, adds_up: false, pale: null,
    meaning: "what the value net learns to expect here. Warm: less than on average. Cool: more.",
  },
  ratio: {
    name: "ratio", warm: -1, adds_up: false, pale: 1, least: 0.01,
    meaning: "π in the last epoch ÷ π before the update. Warm: made rarer. Cool: made likelier.",
  },
  logp: {
    name: "log π", warm: -1, adds_up: true, pale: 0,
    meaning: "of the policy that sampled. Warm: a surprise.",
  },
  ref_logp: {
    name: "log π₀", warm: -1, adds_up: true, pale: 0,
    meaning: "of the frozen reference. Warm: a surprise to it.",
  },
  entropy: {
    name: "entropy", warm: 1, adds_up: false, pale: 0,
    meaning: "of the distribution that the token was drawn from, in nats. Warm: undecided.",
  },
  rise: {
    name: "rise", warm: -1, adds_up: true, pale: 0,
    meaning: "of the score by this token. Warm: it falls. Cool: it rises.",
  },
  prefix: {
    name: "score so far", warm: -1, adds_up: false, pale: null,
    meaning: "of the text up to this token, as if it ended there. Warm: less than on average. Cool: more.",
  },
};
const IN_TABLE = ["logp", "ref_logp", "kl", "rewards", "values", "advantages", "returns", "ratio", "entropy"];
IN_TABLE.push("rise", "prefix");
const SORTS = {
  score: answer => answer.score,
  KL: answer => sum(answer.kl),
  length: answer => answer.tokens.length,
  "worst token": answer => Math.max(...answer.kl),
  judge: answer => answer.judge ?? 0,
  "as sampled": (answer, i) => -i,
};
const view = {
  colour: "kl", sort: "score", down: true, // a key of QUANTITIES, a key of SORTS
  run: 0, shown: 12, open: new Set(), // the run, how many of its answers are shown, which of them with their table
  numbers: false, alike: null, // whether numbers stand under the tokens; the token that is underlined everywhere
  at: null, // the token that is selected: the numbers of its answer and of itself
  large: new Set(), cursor: null, folds: new Map(), // of the charts, and of what can be folded
};
let scales = {}; // of each quantity of the run: what is drawn pale, and how far from it the colour is full
const change = changes => { Object.assign(view, changes); draw("tokens"); };

function scales_of({ answers }) {
  const found = {};
  for (const answer of answers) answer.kl = answer.logp?.map((x, i) => x - answer.ref_logp[i]);
  for (const [key, { pale, least = 0 }] of Object.entries(QUANTITIES)) {
    const all = answers.flatMap(answer => answer[key] || []).filter(finite);
    const centre = pale ?? mean(all);
    const far = all.map(x => Math.abs(x - centre)).sort((a, b) => a - b);
    const reach = Math.max(least, far[Math.floor(far.length * 0.975)] || far.at(-1) || 1);
    if (far.at(-1) >= least / 10) found[key] = { centre, reach }; // else it is rounding alone
  }
  return found;
}

function paint(key, x) {
  const { centre, reach } = scales[key];
  const t = Math.max(-1, Math.min(1, (x - centre) / reach)) * QUANTITIES[key].warm;
  if (!finite(t) || Math.abs(t) < 0.03) return "transparent";
  return tint(t > 0 ? "--hot" : "--cold", 8 + 66 * Math.abs(t));
}
const tint = (name, percent) => `color-mix(in oklab, var(${name}) ${percent.toFixed(0)}%, transparent)`;

function tell(key, x) {
  if (key === "ratio" && finite(x)) return x.toFixed(3);
  return number(x, ["kl", "advantages", "rewards", "rise", "prefix"].includes(key));
}

// A token is a text, the bytes of a part of a character, or {special: its name}.
function spelled(token) {
  const blanks = spaces => "␣".repeat(spaces.length);
  if (typeof token === "string") {
    return visible(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, blanks);
  }
  if (Array.isArray(token)) return token.map(byte => byte.toString(16).padStart(2, "0")).join(" ");
  return visible(token && token.special);
}
const name_of = token => typeof token === "string" ? spelled(token) : h("span", { class: "name" }, spelled(token));

function whole_character(tokens, i) { // the character that a token of bytes is a part of
  const is_part = j => Array.isArray(tokens[j]);
  let [first, last] = [i, i];
  while (is_part(first - 1)) first--;
  while (is_part(last + 1)) last++;
  return visible(new TextDecoder().decode(new Uint8Array(tokens.slice(first, last + 1).flat())));
}

// --- one token ------------------------------------------------------------------------------------------------------

function read_out(answer, i) {
  const token = answer.tokens[i];
  const bytes = Array.isArray(token) ? ` bytes in “${whole_character(answer.tokens, i)}”,` : "";
  const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const facts = Object.keys(scales).map(key => fact(QUANTITIES[key].name, tell(key, answer[key][i])));
  const chances = [answer.logp, answer.ref_logp].map(each => number(Math.exp(each?.[i]))).join(", ");
  const likeliest = (answer.likeliest ?? []).map((by_place, j) => fact(`likeliest under ${["π, updated", "π₀"][j]}`,
    by_place[i].map(([each, p]) => [h("code", { class: "text" }, name_of(each)), soft(` ${fixed(p, 3)} `)])));
  document.getElementById("readout").replaceChildren(
    h("code", { class: "text" }, `“${spelled(token)}”`),
    soft(`${bytes} token ${i + 1} of ${answer.tokens.length}`),
    h("dl", {}, facts, answer.logp && fact("probability under π, π₀", chances)), h("dl", {}, likeliest));
}

function select(span) {
  document.querySelectorAll(".tokens .at").forEach(each => each.classList.remove("at"));
  if (!span) return;
  view.at = [span.parentNode.id, [...span.parentNode.querySelectorAll("span")].indexOf(span)];
  span.classList.add("at");
  span.dispatchEvent(new Event("pointerenter"));
}

addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const at = document.querySelector(".tokens .at"), focused = document.activeElement.closest(".tokens");
  if (!(at || focused) || !step) return;
  const all = [...(focused ?? at.parentNode).querySelectorAll("span")];
  const next = all.includes(at) ? all[all.indexOf(at) + step] : all[0];
  if (!next) return;
  event.preventDefault();
  select(next);
});

// --- one answer -----------------------------------------------------------------------------------------------------

function token_spans(answer) {
  return answer.tokens.map((token, i) => {
    const is_text = typeof token === "string";
    const classes = [!is_text && "name", JSON.stringify(token) === view.alike && "alike"].filter(Boolean);
    const x = answer[view.colour][i];
    const span = h("span", {
      class: classes.join(" ") || null,
      css: { background: paint(view.colour, x) },
      "data-x": view.numbers ? tell(view.colour, x) : null,
      onpointerenter: () => read_out(answer, i),
      onclick: event => select(event.currentTarget),
    }, spelled(token).replace(/^ +/, ""));
    const space = is_text && /^ +(?=.)/.exec(token); // outside of the span, so that a line breaks there
    return [space && space[0], span, is_text && /[\n\r\u2028\u2029]/.test(token) && h("br", {})];
  });
}

function token_table(answer) {
  const keys = IN_TABLE.filter(key => scales[key]);
  const total = key => QUANTITIES[key].adds_up ? tell(key, sum(answer[key])) : `mean ${tell(key, mean(answer[key]))}`;
  const cell = (key, x) => h("td", { css: { background: paint(key, x) } }, tell(key, x));
  const cells = i => keys.map(key => cell(key, answer[key][i]));
  return table(["token", ...keys.map(key => QUANTITIES[key].name)],
    answer.tokens.map((token, i) => h("tr", {}, h("td", {}, h("code", {}, name_of(token))), cells(i))),
    h("tfoot", {}, row(["sum", ...keys.map(total)])));
}

const fact = (name, value) => h("span", {}, soft(`${name} `), h("b", {}, value));
function facts_of_answer(answer, kl_coef) {
  const kl = sum(answer.kl);
  return [
    fact("score", number(answer.score, true)), finite(answer.judge) && fact("judge", number(answer.judge)),
    fact("KL", number(kl)), fact("tokens", answer.tokens.length),
    fact("score − β KL", number(answer.final_score - kl_coef * kl, true)),
    !answer.ended && h("span", { class: "name" }, "did not end"),
  ];
}

function answer_card(answer, number_of, facts) {
  const open = view.open.has(number_of);
  const turn = () => { view.open[open ? "delete" : "add"](number_of); draw("tokens"); };
  return h("article", { class: "card answer" },
    h("header", {}, facts,
      h("button", { type: "button", "aria-expanded": String(open), onclick: turn }, open ? "hide the table" : "table")),
    "prompt" in answer && div("soft", text(answer.prompt, "(empty prompt)")),
    h("div", { class: "tokens", id: `answer-${number_of}`, tabindex: 0 }, token_spans(answer)),
    open && token_table(answer));
}

// --- all answers ----------------------------------------------------------------------------------------------------

// Where the chosen quantity went: its mean at each position, and the tokens that have the most of it.
function where(answers) {
  const { name, adds_up } = QUANTITIES[view.colour], { centre } = scales[view.colour];
  const positions = [], tokens = new Map();
  for (const answer of answers) answer.tokens.forEach((token, i) => {
    const x = answer[view.colour][i], key = JSON.stringify(token);
    (positions[i] ||= []).push(x);
    if (!tokens.has(key)) tokens.set(key, { key, token, all: [] });
    tokens.get(key).all.push(x);
  });
  const reached = positions.filter(all => all.length >= answers.length / 20); // few answers are that long
  const series = [{ kind: "line", points: reached.map((all, i) => [i + 1, mean(all)]), colour: colour(0) }];
  const measure = each => adds_up ? sum(each.all) : mean(each.all);
  const weight = each => Math.abs(measure(each) - centre);
  const often = [...tokens.values()].filter(each => adds_up || each.all.length >= Math.min(5, answers.length));
  const most = often.sort((a, b) => weight(b) - weight(a)).slice(0, 9);
  const bar = each => h("i", { css: {
    width: `${100 * weight(each) / weight(most[0])}%`,
    background: paint(view.colour, measure(each) > centre ? Infinity : -Infinity),
  } });
  const rows = most.map(each => {
    const cells = [name_of(each.token), each.all.length, tell(view.colour, measure(each)), bar(each)];
    const turn = () => change({ alike: view.alike === each.key ? null : each.key });
    const at_key = event => event.key === "Enter" && turn();
    const current = view.alike === each.key ? "true" : null;
    return h("tr", { onclick: turn, onkeydown: at_key, tabindex: 0, "aria-current": current }, cells.map(cell => h("td", {}, cell)));
  });
  const width = innerWidth < 700 ? 340 : 560;
  return div("grid wide",
    chart({ title: `${name} by position`, unit: "mean over the answers", x: "token", series }, width),
    div("card bars",
      h("h3", {}, adds_up ? `tokens with the most ${name}, in all` : `tokens furthest from the usual ${name}`),
      table(["token", "times", adds_up ? "sum" : "mean", ""], rows)));
}

function tools(keys) { // `keys` of SORTS
  const { warm } = QUANTITIES[view.colour], { centre, reach } = scales[view.colour];
  const [left, right] = warm > 0 ? ["--cold", "--hot"] : ["--hot", "--cold"];
  const bar = `linear-gradient(90deg, ${tint(left, 74)}, transparent, ${tint(right, 74)})`;
  const ends = [centre - reach, centre + reach].map(x => tell(view.colour, x));
  const scale = h("span", { class: "scale" }, ends[0], h("i", { css: { background: bar } }), ends[1]);
  const colours = Object.keys(scales).map(key =>
    button(QUANTITIES[key].name, key === view.colour, () => change({ colour: key })));
  const sorts = keys.map(key => {
    const chosen = key === view.sort, arrow = view.down ? " ↓" : " ↑";
    const turn = () => change(chosen ? { down: !view.down } : { sort: key, down: true });
    return button(key + (chosen ? arrow : ""), chosen, turn);
  });
  const numbers = button("numbers", view.numbers, () => change({ numbers: !view.numbers }));
  return h("div", { id: "tools" },
    div("row", div("choice", soft("colour"), colours), scale),
    div("row", keys.length > 0 && div("choice", soft("sort"), sorts), numbers));
}

function rollout_view({ answers, iteration, kl_coef }) {
  const weights = answers.map(SORTS[view.sort]), sign = view.down ? -1 : 1;
  const order = answers.map((answer, i) => i).sort((i, j) => sign * (weights[i] - weights[j]) || i - j);
  const left = order.length - view.shown, judged = answers.some(answer => finite(answer.judge));
  const about = `The ${answers.length} answers of iteration ${iteration}, β = ${number(kl_coef)}`;
  const card = i => answer_card(answers[i], i, facts_of_answer(answers[i], kl_coef));
  return {
    about: `${about}: where the KL was spent, and where blame fell.`,
    sorts: Object.keys(SORTS).filter(key => key !== "judge" || judged),
    shown: [where(answers), div(view.numbers ? "numbers" : null, order.slice(0, view.shown).map(card)),
      left > 0 && div("row", button(`show more (${left} left)`, null, () => change({ shown: view.shown + 24 })))],
  };
}

const sides_of = pair => ["chosen", "rejected"].map(side => { // the scores of prefixes begin with that of the prompt
  const { score, tokens, prefix: [start, ...prefix] } = pair[side];
  return { side, score, tokens, prefix, rise: prefix.map((x, i) => x - (i ? prefix[i - 1] : start)) };
});

function pairs_view({ pairs }, answers) {
  const facts = ({ side, score }) => [h("b", {}, side), fact("score", number(score, true))];
  return {
    about: `${pairs.length} held-out pairs, not picked: where the reward model's score rises.`,
    sorts: [],
    shown: div(view.numbers ? "numbers" : null, pairs.map((pair, i) => [
      h("h3", { class: "asked" }, text(pair.prompt, "(empty prompt)")),
      div("grid wide", [2 * i, 2 * i + 1].map(j => answer_card(answers[j], j, facts(answers[j]))))])),
  };
}

function tokens() {
  const able = runs.filter(run => run.rollout?.answers.length || run.report?.pairs?.length);
  if (!able.length) return [];
  const run = able.includes(runs[view.run]) ? runs[view.run] : able[0], rolled = run.rollout?.answers.length;
  const answers = rolled ? run.rollout.answers : run.sides ??= run.report.pairs.flatMap(sides_of);
  scales = run.scales ??= scales_of({ answers });
  if (!scales[view.colour]) view.colour = Object.keys(scales)[0];
  const { name, meaning } = QUANTITIES[view.colour];
  const { about, sorts, shown } = rolled ? rollout_view(run.rollout) : pairs_view(run.report, answers);
  return [
    h("h2", {}, "Token by token"),
    h("p", {}, soft(about)),
    able.length > 1 && div("row", div("choice", soft("run"), able.map(each =>
      button(each.name, each === run, () => change({ run: runs.indexOf(each), shown: 12, at: null }))))),
    tools(sorts),
    h("p", {}, soft(h("b", {}, name), `: ${meaning}`)),
    shown,
    h("div", { id: "readout" }, soft("Point at a token, or tap it; ← and → go on from there.")),
  ];
}
