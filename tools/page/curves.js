// Line charts as SVG. A series is {label, kind: line, dots or path, points, smooth, band, colour, dash}.

function ticks(low, high, n) { // round numbers between the two, each with its text
  const rough = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= rough * 0.999);
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const how = { maximumFractionDigits: digits, notation: high >= 1e4 ? "compact" : "standard" };
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) {
    found.push([i * step, (i * step || 0).toLocaleString("en", how).replace("-", "−")]);
  }
  return found;
}

// A panel is {title, unit, x: the name of its axis, series, legend, at_least: what y spans, still: without a hover}.
function chart(panel, width = 340) {
  const { title, unit, x: x_name, at_least } = panel, large = view.large.has(title);
  const height = large ? 420 : width > 400 ? 290 : 210, left = 44, right = 8, top = 8, bottom = 40;
  if (large) width = innerWidth < 700 ? 340 : 1100;
  const series = panel.series.map(each => ({ ...each, points: each.points.filter(point => point.every(finite)) }))
    .filter(each => each.points.length);
  const all = series.flatMap(each => [...each.points, ...(each.band ?? []).flatMap(([x, a, b]) => [[x, a], [x, b]])]);
  if (!all.length) return null;
  const bound = (i, choose) => all.reduce((found, point) => choose(found, point[i]), all[0][i]);
  const x0 = bound(0, Math.min), x1 = Math.max(bound(0, Math.max), x0 + (panel.still ? 0.01 : 1));
  const spread = bound(1, Math.max) - bound(1, Math.min);
  const room = spread * 0.06 || Math.abs(all[0][1]) * 0.1 || 1, [low, high] = at_least ?? [Infinity, -Infinity];
  const y0 = Math.min(low, bound(1, Math.min) - room), y1 = Math.max(high, bound(1, Math.max) + room);
  const X = x => left + (x - x0) / (x1 - x0) * (width - left - right);
  const Y = y => top + (y1 - y) / (y1 - y0) * (height - top - bottom);

  const legend = div("legend"), key = each => sample(each.colour, each.kind, each.dash);
  const names = panel.legend ?? series.filter(each => each.label);
  const cursor = s("line", { class: "axis", y1: top, y2: height - bottom });
  const point_at = at => {
    cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(at ?? x0));
    const far = point => Math.abs(point[0] - at);
    const nearest = points => points.reduce((best, point) => far(point) < far(best) ? point : best);
    const value = each => h("span", {}, key(each), number(nearest(each.points)[1]));
    legend.replaceChildren(...at === null
      ? [h("span", {}, unit), ...names.map(each => h("span", {}, key(each), each.label))]
      : [h("span", {}, `${x_name} ${at}`), ...series.map(value)]);
  };
  point_at(view.cursor?.title === title ? view.cursor.at : null);
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const x = Math.max(left, Math.min(width - right, (event.clientX - box.left) / box.width * width));
    view.cursor = { title, at: Math.round(x0 + (x - left) / (width - left - right) * (x1 - x0)) };
    point_at(view.cursor.at);
  };
  const leave = () => {
    if (!svg.isConnected) return; // the page is drawn anew
    view.cursor = null;
    point_at(null);
  };
  const enlarge = event => {
    if (event.pointerType === "touch" && event.currentTarget === svg) return; // a finger reads the numbers
    view.large[large ? "delete" : "add"](title);
    const changed = chart(panel);
    card.replaceWith(changed);
    changed.querySelector("button").focus({ preventScroll: true });
  };
  const svg = s("svg",
    {
      viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, onclick: enlarge,
      onpointermove: panel.still ? null : follow, onpointerleave: leave,
    },
    ticks(y0, y1, large ? 8 : 4).map(([y, name]) => [
      s("line", { class: "axis", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }),
      s("text", { x: left - 5, y: Y(y) + 4, "text-anchor": "end" }, name),
    ]),
    ticks(x0, x1, large ? 10 : 5).map(([x, name]) =>
      s("text", { x: X(x), y: height - 24, "text-anchor": "middle" }, name)),
    s("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x_name),
    cursor,
    series.map(each => drawn(each, X, Y)));
  const card = div(`card chart${large ? " large" : ""}`,
    h("h3", {}, h("button", { type: "button", "aria-expanded": String(large), onclick: enlarge }, title)), legend, svg);
  return card;
}

function drawn({ kind, points, smooth, band, colour: stroke, dash }, X, Y) {
  const place = ([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`;
  const line = (some, more) => s("path", { d: some.map(place).join(""), fill: "none", stroke, ...more });
  if (kind === "line") {
    const around = band?.map(([x, low]) => [x, low]).concat(band.map(([x, , high]) => [x, high]).reverse());
    const area = band && line(around, { class: "band", fill: stroke, stroke: null, opacity: 0.22 });
    const raw = smooth && line(points, { "stroke-width": 1, opacity: 0.28 });
    return [area, raw, line(smooth ?? points, { "stroke-width": 1.9, "stroke-dasharray": dash })];
  }
  const path = kind === "path"; // early points are pale
  const dots = points.map(([x, y], i) => s("circle", {
    cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: path ? 2.6 : 3.2, fill: stroke,
    opacity: path ? (0.2 + 0.8 * i / points.length).toFixed(2) : 1,
  }));
  const bars = (band ?? []).map(([x, low, high]) => line([[x, low], [x, high]], { class: "band", opacity: 0.6 }));
  return [bars, path && line(points, { "stroke-width": 0.8, opacity: 0.45 }), dots];
}

// The series of several seeds as one: their mean, and a band from the lowest to the highest, at the steps of all.
function merged(list) {
  if (list.length < 2 || list[0].kind === "path") return list;
  const seeds = list.map(each => new Map(each.smooth ?? each.points));
  const steps = [...seeds[0].keys()].filter(x => seeds.every(each => each.has(x)));
  const all = steps.map(x => [x, seeds.map(each => each.get(x))]);
  const band = all.map(([x, ys]) => [x, Math.min(...ys), Math.max(...ys)]);
  return [{ ...list[0], smooth: null, points: all.map(([x, ys]) => [x, mean(ys)]), band }];
}

function curves() { // the panels of all runs: one group tells its series by colour, several tell the groups by colour
  const all = groups(), several = all.length > 1;
  const panels = [...new Set(runs.flatMap(run => run.panels.map(panel => panel.title)))].map(title => {
    const found = all.map(group => group.map(run => run.panels.find(panel => panel.title === title)));
    const labels = [...new Set(found.flat().flatMap(panel => panel.series.map(each => each.label)))];
    const of = (group, label) => group.flatMap(panel => panel.series.filter(each => each.label === label));
    const shade = (each, i, j) => ({
      ...each, colour: colour(several ? i : j), dash: several && j ? "4 3" : null,
      band: several && j && each.kind === "line" ? null : each.band, // one band a group
    });
    const series = found.flatMap((group, i) => labels.flatMap((label, j) =>
      merged(of(group, label)).map(each => shade(each, i, j))));
    const with_some = all.flat().filter((run, i) => found.flat()[i].series.length);
    const x = [...new Set(with_some.map(run => run.unit))].join(" or ");
    const grey = labels.map((label, j) => ({ ...shade(of(found.flat(), label)[0], 0, j), colour: "var(--soft)" }));
    const legend = !several ? null : labels.length > 1 ? grey : [];
    return chart({ x, ...found[0][0], series, legend });
  });
  const seeds = group => group.length > 1 && ` ${group.length} seeds: mean, lowest and highest`;
  const name = group => h("span", { class: "run" }, titled(group[0]),
    group.slice(1).map(run => [", ", visible(run.name)]), soft(seeds(group)));
  return [h("h2", {}, "Curves"), runs.length > 1 && h("p", { id: "legend" }, all.map(name)), div("grid", panels)];
}
