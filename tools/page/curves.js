// Line charts as SVG. A series is {label, kind: line, dots or path, points, colour, dash}.

const BOX = { height: 190, left: 40, right: 8, top: 8, bottom: 24 };

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

function smooth(points) { // the running mean over a thirtieth of the points to either side
  const reach = Math.floor(points.length / 30);
  return points.map(([x], i) => [x, mean(points.slice(Math.max(0, i - reach), i + reach + 1).map(point => point[1]))]);
}

function chart(title, unit, series, x_unit, width = 340) {
  const { height, left, right, top, bottom } = BOX;
  series = series.map(each => ({ ...each, points: each.points.filter(point => point.every(finite)) }));
  series = series.filter(each => each.points.length);
  const all = series.flatMap(each => each.points);
  if (!all.length) return null;
  const bound = (i, choose) => all.reduce((found, point) => choose(found, point[i]), all[0][i]);
  const x0 = bound(0, Math.min), x1 = Math.max(bound(0, Math.max), x0 + 1e-9);
  const spread = bound(1, Math.max) - bound(1, Math.min);
  const room = spread * 0.06 || Math.abs(all[0][1]) * 0.1 || 1;
  const y0 = bound(1, Math.min) - room, y1 = bound(1, Math.max) + room;
  const X = x => left + (x - x0) / (x1 - x0) * (width - left - right);
  const Y = y => top + (y1 - y) / (y1 - y0) * (height - top - bottom);

  const legend = div("legend");
  const label = at => {
    legend.replaceChildren(...(at === null ? legend_of(series, unit) : numbers_at(series, at, x_unit)));
  };
  label(null);
  const cursor = s("line", { class: "axis", y1: top, y2: height - bottom, visibility: "hidden" });
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const x = Math.max(left, Math.min(width - right, (event.clientX - box.left) / box.width * width));
    const at = Math.round(x0 + (x - left) / (width - left - right) * (x1 - x0));
    const changes = { visibility: "visible", x1: X(at), x2: X(at) };
    for (const [name, value] of Object.entries(changes)) cursor.setAttribute(name, value);
    label(at);
  };
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    label(null);
  };
  const over_steps = series[0].kind !== "path";
  const svg = s("svg",
    {
      viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title,
      onpointermove: over_steps ? follow : null, onpointerleave: leave,
    },
    ticks(y0, y1, 4).map(([y, name]) => [
      s("line", { class: "axis", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }),
      s("text", { x: left - 5, y: Y(y) + 3.5, "text-anchor": "end" }, name),
    ]),
    ticks(x0, x1, 5).map(([x, name]) => s("text", { x: X(x), y: height - 9, "text-anchor": "middle" }, name)),
    cursor,
    series.map(each => drawn(each, X, Y)));
  return div("card chart", h("h3", {}, title), legend, svg);
}

function drawn({ kind, points, colour: stroke, dash }, X, Y) {
  const place = ([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`;
  const line = (some, more) => s("path", { d: some.map(place).join(""), fill: "none", stroke, ...more });
  if (kind === "line") {
    const raw = line(points, { "stroke-width": 1, opacity: 0.28 });
    return [raw, line(smooth(points), { "stroke-width": 1.9, "stroke-dasharray": dash })];
  }
  const path = kind === "path"; // early points are pale
  const dots = points.map(([x, y], i) => s("circle", {
    cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: path ? 2.6 : 3.2, fill: stroke,
    opacity: path ? (0.2 + 0.8 * i / points.length).toFixed(2) : 1,
  }));
  return [path && line(points, { "stroke-width": 0.8, opacity: 0.45 }), dots];
}

function legend_of(series, unit) {
  const named = series.filter(each => each.label);
  return named.length ? named.map(each => h("span", {}, dot(each.colour, each.dash), each.label)) : [unit];
}

function numbers_at(series, at, x_unit) {
  const far = point => Math.abs(point[0] - at);
  const nearest = points => points.reduce((best, point) => far(point) < far(best) ? point : best);
  const value = each => h("span", {}, dot(each.colour, each.dash), number(nearest(each.points)[1]));
  return [h("span", {}, `${x_unit} ${at}`), ...series.map(value)];
}

function curves() { // the panels of all runs: one run tells its series by colour, several tell the runs by colour
  const several = runs.length > 1;
  const panels = [...new Set(runs.flatMap(run => run.panels.map(panel => panel.title)))].map(title => {
    const found = runs.map(run => run.panels.find(panel => panel.title === title));
    const series = found.flatMap((panel, i) => (panel ? panel.series : []).map((each, j) => ({
      ...each,
      colour: colour(several ? i : j),
      dash: several && j ? "4 3" : null,
      label: several ? visible(runs[i].name) + (panel.series.length > 1 ? `: ${each.label}` : "") : each.label,
    })));
    return chart(title, found.find(Boolean).unit, series, runs[0].unit);
  });
  return [h("h2", {}, "Curves"), div("grid", panels)];
}
