// One SAE: why it stands where it does, how to fetch it, its figures, curves and firing rates.

let openedBy = null;

const CURVES = [["loss", "Loss", true], ["l0", "L0", true], ["explained_variance", "Explained variance", false],
  ["dead_fraction", "Dead fraction", false]];

function openDetail(key, from = null) {
  const sae = BY_KEY.get(key), dialog = byId("detail");
  if (!sae) return;
  hideTip();
  if (!dialog.open) openedBy = from ?? document.activeElement;
  STATE.sae = key;
  dialog.replaceChildren(bar(sae), element("div", { className: "detail-body" }, ...content(sae)));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  drawSmall();
  markPicked();
  remember();
}

function closeDetail() {
  byId("detail").close();
}

function closed() {
  const key = STATE.sae;
  STATE.sae = "";
  remember();
  markPicked();
  const again = openedBy?.isConnected ? openedBy
    : document.querySelector(`.point[data-key="${CSS.escape(key)}"]`) ?? byId("saes");
  openedBy = null;
  again.focus?.({ preventScroll: true });
  hideTip();
}

function bar(sae) {
  const listed = tableOrder(), at = listed.indexOf(sae);
  const step = (by, label, sign) => {
    const next = listed[at + by];
    const button = element("button", { type: "button", className: "quiet", ariaLabel: label, title: label, disabled: !next }, sign);
    button.addEventListener("click", () => {
      openDetail(next.key);
      [...byId("detail").querySelectorAll(".detail-bar div .quiet")][by < 0 ? 0 : 1].focus();
    });
    return button;
  };
  const close = element("button", { type: "button", className: "quiet", id: "close" }, "Close");
  close.addEventListener("click", closeDetail);
  return element("div", { className: "detail-bar" },
    element("div", {}, step(-1, "Previous SAE of the table", "↑"), step(1, "Next SAE of the table", "↓")), close);
}

function content(sae) {
  const answer = ANSWERS.get(sae.hook);
  const taken = answer?.key === sae.key;
  const why = taken ? [...answer.why.map(said => [said, ""]), ...sae.why.filter(([said]) => !said.startsWith("One seed"))] : sae.why;
  return [
    element("div", {}, element("h2", { id: "detail-title" }, glyph(sae.architecture, sae.front), " ", sae.called),
      element("p", { className: "where" }, `${HOOKS[sae.hook]} · SAE ${sae.key}`), verdict(sae)),
    element("section", { ariaLabel: "Why" },
      element("h3", {}, taken ? "Take this one, because" : sae.front ? "Where it stands" : "Why not this one"),
      element("ul", { className: "because" }, why.map(([said, key]) => element("li", {}, said, key ? [" ", saeLink(key, "Open it")] : []))),
      sae.missed && !sae.targets.length ? element("p", {}, `Misses its targets: ${sae.missed}.`) : null,
      sae.remedy ? element("p", {}, `For the missed targets: ${sae.remedy}.`) : null),
    sae.command === null ? null : element("section", { ariaLabel: "Fetch and load" },
      element("h3", {}, "Fetch and load it"),
      copyable(sae.command, "the command that fetches it"),
      copyable(`from sae_core import SAE\nsae = SAE.load(${JSON.stringify(sae.folder)})`, "the code that loads it")),
    figureTable(sae),
    curveSection(sae),
    rateSection(sae),
    element("section", { ariaLabel: "Settings" }, element("h3", {}, "Settings"),
      element("dl", { className: "settings" }, Object.entries(sae.settings).map(([name, value]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, text(value)))))),
  ].filter(Boolean);
}

function verdict(sae) {
  return sae.targets.length ? targetChips(sae.targets) : null;
}

function targetChips(targets) {
  return element("ul", { className: "chips", ariaLabel: "Targets" }, targets.map(({ name, target, value, met }) => {
    const decimals = FIGURE.get(name)?.decimals ?? 3;
    return element("li", { className: met ? "met" : met === null ? "unknown" : "missed" },
      met ? `✓ ${target}` : met === null ? `${target}: no figure` : `✗ ${target}: ${text(value, decimals)}`);
  }));
}

function saeLink(key, label) {
  const button = element("button", { type: "button", className: "link" }, label);
  button.addEventListener("click", () => openDetail(key));
  return button;
}

function figureTable(sae) {
  const there = FIGURES.filter(figure => figure.name in sae.figures);
  if (!there.length) return null;
  const rows = figures => figures.map(figure => element("tr", {},
    element("th", { scope: "row", title: figure.about }, figure.label), element("td", {}, shown(sae, figure.name)),
    element("td", { className: "soft" }, interval(sae, figure.name) || "–")));
  const head = () => element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Figure"),
    element("th", { scope: "col" }, "Value"), element("th", { scope: "col" }, "95% interval")));
  const more = there.filter(figure => !figure.lead);
  return element("section", { ariaLabel: "Figures" }, element("h3", {}, "Figures"),
    element("table", { className: "figures" }, head(), element("tbody", {}, rows(there.filter(figure => figure.lead)))),
    more.length ? element("details", {}, element("summary", {}, `${more.length} more`),
      element("table", { className: "figures" }, head(), element("tbody", {}, rows(more)))) : null);
}

// ---- curves and firing rates ----------------------------------------------------------------------------------------

let small = [];  // what is drawn once its place has a width

function drawSmall() {
  for (const draw of small) draw();
}

function curveSection(sae) {
  small = [];
  const own = DATA.details[sae.key]?.curves ?? DATA.details[sae.whole]?.curves;
  if (!own || !own.tokens.length) return null;
  const taken = ANSWERS.get(sae.hook)?.key;
  const other = taken && taken !== sae.key ? DATA.details[BY_KEY.get(taken).whole]?.curves : null;
  const charts = CURVES.filter(([name]) => own[name]?.some(value => value !== null))
    .map(([name, label, log]) => curve(own, other, name, label, log, sae.architecture));
  const of = sae.key === sae.whole ? "" : " of the whole SAE";
  return element("section", { ariaLabel: "Training" }, element("h3", {}, `Training${of}, over tokens`),
    element("div", { className: "curves" }, charts),
    other ? element("p", { className: "hint" }, `Dashed: ${BY_KEY.get(taken).called}, the one to take.`) : null);
}

function curve(own, other, name, label, log, architecture) {
  const svg = drawn("svg", { class: "small", role: "img" });
  const usable = value => value !== null && value !== undefined && (!log || value > 0);
  const pairs = curves => curves.tokens.map((tokens, index) => [tokens, curves[name]?.[index]]).filter(([, value]) => usable(value));
  const points = pairs(own), others = other ? pairs(other) : [];
  const last = points.at(-1);
  const readout = element("span", { className: "soft" }, last ? `ends at ${text(+last[1].toPrecision(4))}` : "");
  const figure = element("figure", {}, element("figcaption", {}, element("b", {}, label), readout), svg);
  if (!last) return figure;
  svg.setAttribute("aria-label", `${label} over tokens: from ${points[0][1]} to ${last[1]} at ${short(last[0])} tokens`);
  small.push(() => {
    const width = figure.clientWidth || 300, height = 150, left = 44, right = width - 8, top = 8, bottom = height - 22;
    const scaled = log ? Math.log10 : value => value;
    const values = [...points, ...others].map(([, value]) => scaled(value));
    let [low, high] = [quantile(values, 0.01), quantile(values, 1)];
    if (high - low < 1e-6) [low, high] = [low - 0.05, high + 0.05];
    const pad = (high - low) * 0.06, most = Math.max(points.at(-1)[0], others.at(-1)?.[0] ?? 0);
    [low, high] = [low - pad, high + pad];
    const x = tokens => left + tokens / most * (right - left);
    const y = value => bottom - Math.min(Math.max((scaled(value) - low) / (high - low), 0), 1) * (bottom - top);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const ticks = log ? logTicks(low, high, 4) : steps(low, high, 4);
    const line = drawn("polyline", { class: "curve", points: points.map(([tokens, value]) => `${x(tokens).toFixed(1)},${y(value).toFixed(1)}`).join(" ") });
    line.style.stroke = colour(architecture);
    const at = drawn("line", { class: "at", y1: top, y2: bottom, visibility: "hidden" });
    svg.replaceChildren(
      ...ticks.flatMap(tick => [drawn("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
        drawn("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick))]),
      drawn("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      ...steps(0, most, 4).map(tick => drawn("text", { x: Math.min(x(tick), right - 4), y: height - 6, "text-anchor": tick ? "middle" : "start" }, short(tick))),
      drawn("polyline", { class: "other", points: others.map(([tokens, value]) => `${x(tokens).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }),
      line, at);
    svg.onpointermove = event => {
      const tokens = (event.clientX - svg.getBoundingClientRect().left - left) / (right - left) * most;
      const near = points.reduce((best, point) => Math.abs(point[0] - tokens) < Math.abs(best[0] - tokens) ? point : best);
      at.setAttribute("x1", x(near[0]));
      at.setAttribute("x2", x(near[0]));
      at.setAttribute("visibility", "visible");
      readout.textContent = `${text(+near[1].toPrecision(4))} at ${short(near[0])}`;
    };
    svg.onpointerleave = () => {
      at.setAttribute("visibility", "hidden");
      readout.textContent = `ends at ${text(+last[1].toPrecision(4))}`;
    };
  });
  return figure;
}

function quantile(values, share) {
  const sorted = values.slice().sort((a, b) => a - b);
  return sorted[Math.min(Math.floor(share * sorted.length), sorted.length - 1)];
}

function rateSection(sae) {
  const rates = DATA.details[sae.key]?.firing_rates;
  if (!rates) return null;
  const fired = rates.counts.reduce((sum, count) => sum + count, 0), all = fired + (rates.never ?? 0);
  const svg = drawn("svg", { class: "small", role: "img" });
  const often = share => {
    let count = 0;
    rates.counts.forEach((one, index) => { if (rates.edges[index] >= share) count += one; });
    return count;
  };
  const sentence = `${text(fired)} of ${text(all)} latents fired`
    + (fired ? `; ${text(often(-1))} of them on more than one token in ten` : "") + ".";
  svg.setAttribute("aria-label", `Histogram of log10 firing rates. ${sentence}`);
  const section = element("section", { ariaLabel: "Firing rates" },
    element("h3", {}, "How often its latents fire"), svg, element("p", { className: "hint" }, sentence));
  small.push(() => {
    const width = svg.clientWidth || 600, height = 150, left = 44, right = width - 8, top = 8, bottom = height - 34;
    const never = rates.never ?? 0, room = never ? 40 : 0;
    const low = rates.edges[0] ?? -6, high = Math.max(rates.edges.at(-1) ?? 0, low + 1);
    const most = Math.max(...rates.counts, never, 1);
    const x = at => left + room + (at - low) / (high - low) * (right - left - room);
    const y = count => bottom - count / most * (bottom - top);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const bars = rates.counts.map((count, index) => {
      const from = x(rates.edges[index]), to = x(rates.edges[index + 1]);
      const bar = drawn("rect", { x: from + 0.75, width: Math.max(to - from - 1.5, 1), y: y(count), height: bottom - y(count) });
      bar.style.fill = colour(sae.architecture);
      bar.append(drawn("title", {}, `${count} latents fire on 10^${rates.edges[index]} to 10^${rates.edges[index + 1]} of the tokens`));
      return bar;
    });
    const decades = [];
    for (let exponent = Math.ceil(low); exponent <= high; exponent++) decades.push(exponent);
    const stride = Math.ceil(decades.length / ((right - left - room) / 44));
    svg.replaceChildren(
      ...steps(0, most, 4).flatMap(tick => [drawn("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
        drawn("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick))]),
      ...bars,
      ...(never ? [drawn("rect", { class: "never", x: left + 4, width: 22, y: y(never), height: bottom - y(never) }),
        drawn("text", { x: left + 15, y: bottom + 15, "text-anchor": "middle" }, "never")] : []),
      drawn("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      ...decades.filter((_, index) => (decades.length - 1 - index) % stride === 0).map(exponent =>
        drawn("text", { x: Math.min(x(exponent), right - 6), y: bottom + 15, "text-anchor": "middle" }, exponent === 0 ? "1" : `1e${exponent}`)),
      drawn("text", { x: (left + room + right) / 2, y: height - 4, "text-anchor": "middle" }, "share of tokens a latent is active on"));
  });
  return section;
}
