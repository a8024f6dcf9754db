// The front of each hook point: L0 (log) against CE recovered, an SAE a point.

const Y_AXES = [
  { name: "lost", label: "CE recovered, spread near 1", figure: "ce_recovered", lost: true, front: true },
  { name: "ce_recovered", label: "CE recovered, linear", figure: "ce_recovered", front: true },
  { name: "ce_increase", label: "CE increase (nats, log)", figure: "ce_increase", log: true, down: true, front: true },
  { name: "explained_variance", label: "Explained variance", figure: "explained_variance" },
  { name: "kl_recovered", label: "KL recovered", figure: "kl_recovered" },
].filter(axis => axis.figure === "ce_recovered" || FIGURE.has(axis.figure));
const LEAST_LOST = 1e-4;  // where the axis of what is lost ends
const SHARES = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998];
const MARGIN = { left: 58, right: 16, top: 14, bottom: 44 };

const yAxis = () => Y_AXES.find(axis => axis.name === STATE.y) ?? Y_AXES[0];
const xOf = l0 => Math.log10(Math.max(l0, 0.1));

/** Where a value stands on an axis, in the axis' own measure: up is better. Null off it. */
function yOf(axis, value) {
  if (value === undefined || value === null) return null;
  if (axis.lost) return -Math.log10(Math.max(1 - value, LEAST_LOST));
  if (axis.log) return -Math.log10(Math.max(value, LEAST_LOST));
  return value;
}

function steps(low, high, most) {  // round numbers between two, at most so many
  const raw = Math.max(high - low, 1e-9) / most, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * size).find(one => one >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(+at.toPrecision(12));
  return found;
}

function logTicks(low, high, most) {  // of log10 limits: 1, 2, 5 a decade, or fewer
  const of = factors => {
    const found = [];
    for (let exponent = Math.floor(low) - 1; exponent <= high; exponent++)
      for (const factor of factors) {
        const at = Math.log10(factor) + exponent;
        if (at >= low - 1e-9 && at <= high + 1e-9) found.push(+(factor * 10 ** exponent).toPrecision(12));
      }
    return found;
  };
  if (high - low < 0.5) {
    const linear = steps(10 ** low, 10 ** high, Math.min(most, 6));
    if (linear.length > 1) return linear;
  }
  for (const factors of [[1, 2, 3, 5, 7], [1, 2, 5], [1]]) if (of(factors).length <= most) return of(factors);
  const decades = of([1]);
  return decades.filter((_, index) => index % Math.ceil(decades.length / most) === 0);
}

function yTicks(axis, [low, high], most) {
  if (axis.lost) {
    const there = SHARES.map(share => [yOf(axis, share), String(share)]).filter(([at]) => at >= low && at <= high);
    if (there.length >= 3) return thinned(there, most, low, high);
    return steps(Math.max(1 - 10 ** -low, -1), 1 - 10 ** -high, most).map(value => [yOf(axis, value), String(value)])
      .filter(([at]) => at >= low && at <= high);
  }
  if (axis.log) return logTicks(-high, -low, most).map(value => [-Math.log10(value), text(value)]);
  return steps(low, high, most).map(value => [value, String(value)]);
}

function thinned(ticks, most, low, high) {  // no two closer than the room that their text needs
  const gap = (high - low) / (most * 1.6), kept = [];
  for (const tick of ticks) if (!kept.length || tick[0] - kept.at(-1)[0] >= gap) kept.push(tick);
  return kept;
}

/** The limits of both axes, the same for every panel of one measure: of what passes the filters, and of the baselines
    within their L0. */
function limits(axis, seen) {
  const xs = seen.map(sae => xOf(sae.figures.l0));
  const filtered = STATE.low !== null || STATE.high !== null;
  const others = DATA.baselines.filter(line => STATE.hook === "" || HOOKS[line.hook] === STATE.hook)
    .flatMap(line => line.points).map(point => [xOf(point.figures.l0), yOf(axis, point.figures[axis.figure])]);
  const [least, most] = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 2];
  const near = others.filter(([x, y]) => y !== null && (!filtered || (x >= least - 0.1 && x <= most + 0.1)));
  const x = xs.concat(near.map(([at]) => at));
  const ys = seen.map(sae => yOf(axis, sae.figures[axis.figure])).filter(value => value !== null)
    .concat(near.map(([, at]) => at));
  for (const sae of seen) {
    const bounds = sae.intervals[axis.figure];
    if (bounds) ys.push(...bounds.map(bound => yOf(axis, bound)).filter(value => value !== null));
  }
  let [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
  if (!axis.log) low = Math.max(low, Math.min(0, yOf(axis, 0)));  // worse than leaving the layer out: at the foot
  const pad = Math.max(high - low, 0.02) * 0.07;
  const [left, right] = x.length ? [Math.min(...x), Math.max(...x)] : [0, 2];
  const side = Math.max(right - left, 0.3) * 0.06;
  return { x: [left - side, right + side], y: [low - pad, high + 1.6 * pad] };
}

const evaluated = sae => sae.figures.l0 !== undefined && sae.figures.ce_recovered !== undefined;

class Panel {
  constructor(hook) {
    this.hook = hook;
    this.svg = drawn("svg", { class: "plot", role: "group" });
    this.root = element("section", { className: "panel", ariaLabel: `Front of ${HOOKS[hook]}` },
      element("h3", { title: HOOKS[hook] }, HOOKS[hook]), this.svg);
    this.near = [];
    this.current = 0;
    this.svg.addEventListener("pointermove", event => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("click", event => this.click(event));
    this.root.addEventListener("keydown", event => this.key(event));
    this.root.addEventListener("focusin", event => this.focus(event));
    this.root.addEventListener("focusout", () => this.leave());
  }

  draw(range, seen) {
    const axis = yAxis(), width = this.root.clientWidth || 440, height = this.svg.clientHeight || 400;
    const saes = seen.filter(sae => sae.hook === this.hook && yOf(axis, sae.figures[axis.figure]) !== null);
    const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const x = at => inner.left + (at - range.x[0]) / (range.x[1] - range.x[0]) * (inner.right - inner.left);
    const y = at => {
      const share = (at - range.y[0]) / (range.y[1] - range.y[0]);
      return inner.bottom - Math.min(Math.max(share, 0), 1) * (inner.bottom - inner.top);
    };
    this.at = sae => [x(xOf(sae.figures.l0)), y(yOf(axis, sae.figures[axis.figure]))];
    this.near = [];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const count = saes.length === 1 ? "1 SAE" : `${saes.length} SAEs`;
    this.svg.setAttribute("aria-label", `${HOOKS[this.hook]}: ${axis.label} against L0, ${count}. `
      + "Arrow keys go from SAE to SAE, Enter opens one.");
    const parts = [...this.frame(axis, range, inner, x, y), ...this.lines(axis, range, inner, x, y),
      ...this.front(axis, saes), ...this.seeds(saes), ...this.errors(axis, saes, x, y, inner)];
    const had = this.svg.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.points = saes.slice().sort((a, b) => a.figures.l0 - b.figures.l0 || a.figures.ce_recovered - b.figures.ce_recovered)
      .map(sae => this.point(sae));
    const over = this.points.slice().sort((a, b) => BY_KEY.get(a.dataset.key).front - BY_KEY.get(b.dataset.key).front);
    this.svg.replaceChildren(...parts, ...this.named(saes, inner), drawn("g", {}, over), this.ring = drawn("circle",
      { class: "focus", r: 12, visibility: "hidden" }));
    this.current = Math.min(this.current, Math.max(this.points.length - 1, 0));
    this.points.forEach((point, index) => point.setAttribute("tabindex", index === this.current ? "0" : "-1"));
    if (had !== null) this.points.find(point => point.dataset.key === had)?.focus();
    if (!saes.length)
      this.svg.append(drawn("text", { x: (inner.left + inner.right) / 2, y: (inner.top + inner.bottom) / 2,
        "text-anchor": "middle" }, SAES.some(sae => sae.hook === this.hook && evaluated(sae))
        ? "no SAE here passes the filters" : "no SAE of this hook point has been evaluated"));
  }

  *frame(axis, range, inner, x, y) {
    const [low, high] = DATA.band ? [xOf(DATA.band[0]), DATA.band[1] === null ? Infinity : xOf(DATA.band[1])] : [1, 0];
    const from = Math.max(low, range.x[0]), to = Math.min(high, range.x[1]);
    if (from < to) {
      yield drawn("rect", { class: "band", x: x(from), y: inner.top, width: x(to) - x(from), height: inner.bottom - inner.top });
      yield drawn("text", { class: "band-label", x: x(to) - 6, y: inner.bottom - 7, "text-anchor": "end" }, "L0 band");
    }
    for (const [at, label] of yTicks(axis, range.y, 8)) {
      yield drawn("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y(at), y2: y(at) });
      yield drawn("text", { x: inner.left - 8, y: y(at) + 4, "text-anchor": "end" }, label);
    }
    const room = Math.max(Math.floor((inner.right - inner.left) / 48), 3);
    for (const value of logTicks(range.x[0], range.x[1], room)) {
      const at = x(Math.log10(value));
      yield drawn("line", { class: "grid", x1: at, x2: at, y1: inner.top, y2: inner.bottom });
      yield drawn("text", { x: at, y: inner.bottom + 17, "text-anchor": "middle" }, short(value));
    }
    yield drawn("line", { class: "axis", x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom });
    const middle = (inner.top + inner.bottom) / 2;
    yield drawn("text", { x: (inner.left + inner.right) / 2, y: inner.bottom + 36, "text-anchor": "middle" },
      "L0 (active latents a token)");
    yield drawn("text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` },
      axis.down ? `${axis.label}, less is up` : axis.label.replace(/,.*/, ""));
  }

  *lines(axis, range, inner, x, y) {
    for (const line of DATA.baselines) {
      if (line.hook !== this.hook) continue;
      const points = line.points.map(point => ({ point, x: xOf(point.figures.l0), y: yOf(axis, point.figures[axis.figure]) }))
        .filter(one => one.y !== null && one.x >= range.x[0] && one.x <= range.x[1]);
      const inside = points.map(one => [x(one.x), y(one.y)]);
      if (inside.length > 1)
        yield drawn("polyline", { class: "baseline", "stroke-dasharray": line.dashes, points: inside.join(" ") });
      for (const [index, { point }] of points.entries()) {
        const [px, py] = inside[index];
        yield drawn("circle", { class: "baseline-point", cx: px, cy: py, r: 2.8 });
        this.near.push({ x: px, y: py, line, point });
      }
    }
  }

  *front(axis, saes) {
    if (!axis.front) return;
    // The front of widths and of what cannot be told apart is wider than a line: the line joins the best of it.
    let best = -Infinity;
    const line = saes.filter(sae => sae.front).sort((a, b) => a.figures.l0 - b.figures.l0 || b.figures.ce_recovered - a.figures.ce_recovered)
      .filter(sae => sae.figures.ce_recovered > best && ((best = sae.figures.ce_recovered), true)).map(this.at);
    if (line.length > 1) yield drawn("polyline", { class: "front", points: line.join(" ") });
  }

  *seeds(saes) {  // the seeds of one choice of settings, linked
    const groups = Map.groupBy(saes.filter(sae => sae.seeds !== null), sae => sae.seeds);
    for (const group of groups.values()) {
      if (group.length < 2) continue;
      const points = group.map(this.at).sort((a, b) => a[1] - b[1]);
      const line = drawn("polyline", { class: "seeds", points: points.join(" ") });
      line.style.stroke = colour(group[0].architecture);
      yield line;
    }
  }

  *errors(axis, saes, x, y, inner) {
    const within = at => Math.min(Math.max(at, inner.left), inner.right);
    for (const sae of saes) {
      const [px, py] = this.at(sae), up = sae.intervals[axis.figure], across = sae.intervals.l0;
      const bars = [];
      if (up) bars.push(["M", px, y(yOf(axis, up[0])), "V", y(yOf(axis, up[1]))].join(" "));
      if (across) bars.push(["M", within(x(xOf(across[0]))), py, "H", within(x(xOf(across[1])))].join(" "));
      if (!bars.length) continue;
      const line = drawn("path", { class: "error", d: bars.join("") });
      line.style.stroke = colour(sae.architecture);
      yield line;
    }
  }

  point(sae) {
    const [x, y] = this.at(sae);
    const mark = markPath(sae.architecture, sae.front);
    const made = drawn("g", { class: "point", transform: `translate(${x} ${y}) scale(0.9)`, role: "button", "data-key": sae.key,
      "aria-haspopup": "dialog", "aria-label": spoken(sae) }, mark);
    if (sae.front) mark.style.stroke = "var(--ink)";
    this.near.push({ x, y, sae });
    return made;
  }

  *named(saes, inner) {  // the SAE to take and the knee
    const answer = ANSWERS.get(this.hook);
    if (!answer) return;
    const marked = [[answer.key, answer.key === answer.knee ? "take this; knee" : "take this", "ring"],
      [answer.knee === answer.key ? null : answer.knee, "knee", "ring knee"]];
    for (const [key, label, kind] of marked) {
      const sae = saes.find(one => one.key === key);
      if (!sae) continue;
      const [x, y] = this.at(sae);
      const half = label.length * 3.6;  // above the front nothing else lies
      yield drawn("circle", { class: kind, cx: x, cy: y, r: 10.5 });
      yield drawn("text", { class: "name", x: Math.min(Math.max(x, inner.left + half), inner.right + MARGIN.right - half - 2),
        y: y - 17, "text-anchor": "middle" }, label);
    }
  }

  // ---- pointer and keyboard ----

  nearest(event) {
    const box = this.svg.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 26;
    for (const one of this.near) {
      const distance = Math.hypot(one.x - x, one.y - y) + (one.sae ? 0 : 6);
      if (distance < least) [best, least] = [one, distance];
    }
    return best;
  }

  hover(event) {
    const one = this.nearest(event);
    this.svg.style.cursor = one?.sae ? "pointer" : "";
    if (one) this.show(one, event.clientX, event.clientY);
    else this.leave();
  }

  click(event) {
    const one = this.nearest(event);
    if (!one?.sae) return;
    const point = this.points.find(other => other.dataset.key === one.sae.key);
    openDetail(one.sae.key, point);
  }

  key(event) {
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      openDetail(document.activeElement.dataset.key, document.activeElement);
    } else if (event.key === "Escape") {
      hideTip();
    } else if (event.key in moves && this.points.length) {
      event.preventDefault();
      const next = Math.min(Math.max(this.current + moves[event.key], 0), this.points.length - 1);
      this.points[next].focus();
    }
  }

  focus(event) {
    const index = this.points.indexOf(event.target);
    if (index < 0) return;
    this.points[this.current]?.setAttribute("tabindex", "-1");
    this.current = index;
    event.target.setAttribute("tabindex", "0");
    this.rest();
  }

  show(one, x, y) {
    this.ring.setAttribute("cx", one.x);
    this.ring.setAttribute("cy", one.y);
    this.ring.setAttribute("visibility", "visible");
    showTip(one.sae ? aboutSAE(one.sae) : aboutBaseline(one), x, y);
  }

  /** Back to the point that the keyboard is on, if it is on one. Returns whether it is. */
  rest() {
    const focused = this.points?.find(point => point === document.activeElement && point.matches(":focus-visible"));
    const one = focused && this.near.find(other => other.sae?.key === focused.dataset.key);
    if (!one) {
      this.ring?.setAttribute("visibility", "hidden");
      return false;
    }
    const box = this.svg.getBoundingClientRect();
    this.show(one, box.left + one.x, box.top + one.y);
    return true;
  }

  leave() {
    if (!this.rest()) hideTip();
  }
}

function spoken(sae) {
  const figures = FIGURES.filter(figure => figure.lead && figure.name in sae.figures)
    .map(figure => `${figure.label} ${shown(sae, figure.name)} ${interval(sae, figure.name)}`.trim());
  return [sae.called, sae.front ? "on the front" : "not on the front", ...figures].join(", ");
}

function aboutSAE(sae) {
  const rows = FIGURES.filter(figure => (figure.lead || sae.intervals[figure.name]) && figure.name in sae.figures)
    .map(figure => element("tr", {}, element("td", { className: "soft" }, figure.label),
      element("td", {}, shown(sae, figure.name), " ", element("small", { className: "soft" }, interval(sae, figure.name)))));
  const mates = sae.seeds === null ? [] : SAES.filter(other => other.seeds === sae.seeds && evaluated(other));
  const recovered = mates.map(other => other.figures.ce_recovered);
  const notes = [sae.why.find(([said]) => said.startsWith("Not on") || said.startsWith("On the"))?.[0]];
  if (mates.length > 1)
    notes.push(`${mates.length} seeds: CE recovered ${text(Math.min(...recovered), 4)} to ${text(Math.max(...recovered), 4)}.`);
  if (sae.missed) notes.push(`Misses ${sae.missed}.`);
  return [element("b", {}, glyph(sae.architecture, sae.front), " ", sae.called),
    element("table", {}, element("tbody", {}, rows)),
    ...notes.filter(Boolean).map(note => element("p", {}, note))];
}

function aboutBaseline({ line, point }) {
  const rows = Object.entries(point.figures).map(([name, value]) => element("tr", {},
    element("td", { className: "soft" }, FIGURE.get(name)?.label ?? name),
    element("td", {}, text(value, FIGURE.get(name)?.decimals ?? 4))));
  const what = line.reference ? "A basis of the target: it sees what a transcoder has to predict."
    : "A baseline: what an SAE has to beat.";
  return [element("b", {}, point.k === null ? line.label : `${line.label}, k=${text(point.k)}`),
    element("table", {}, element("tbody", {}, rows)), element("p", {}, what)];
}
