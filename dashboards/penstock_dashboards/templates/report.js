// The page: the answer first, then filters, plots, tables, cost, protocol and spec.

const panels = HOOKS.map((_, hook) => new Panel(hook));

// ---- the answer -----------------------------------------------------------------------------------------------------

function keyFigure(sae, name) {
  if (!(name in sae.figures)) return null;
  const bounds = interval(sae, name);
  return element("div", {}, element("dt", {}, FIGURE.get(name).label),
    element("dd", {}, name === "dead_fraction" ? `${text(100 * sae.figures[name], 1)}%` : shown(sae, name),
      bounds ? element("small", {}, bounds) : null));
}

function answerCard(answer) {
  const where = element("p", { className: "where", title: HOOKS[answer.hook] }, HOOKS[answer.hook]);
  if (answer.key === null)
    return element("article", { className: "card answer", ariaLabel: HOOKS[answer.hook] },
      element("div", {}, where, element("h3", { className: "name" }, "None to take yet")),
      element("ul", { className: "because" }, answer.why.map(said => element("li", {}, said))));
  const sae = BY_KEY.get(answer.key);
  const [kind, ...rest] = sae.called.startsWith(sae.kind) ? [sae.kind, sae.called.slice(sae.kind.length).trim()] : [sae.called];
  const because = element("ul", { className: "because first" }, answer.why.map(said => element("li", {}, said)));
  const open = element("button", { type: "button", className: "link", ariaLabel: `Details of ${sae.called} at ${HOOKS[sae.hook]}` },
    Object.hasOwn(DATA.details, sae.whole) ? "Curves, firing rates, settings" : "All its figures and settings");
  open.addEventListener("click", () => openDetail(sae.key, open));
  const also = answer.also.map(([key, what, said]) => element("p", { className: "soft" }, key === answer.key ? said
    : [element("b", {}, what === "knee" ? "Knee instead: " : "Sparser instead: "), glyph(BY_KEY.get(key).architecture), " ",
      saeLink(key, BY_KEY.get(key).called), ` – ${said.replace(/^the front's knee: /, "")}`]));
  return element("article", { className: "card answer", ariaLabel: HOOKS[answer.hook] },
    element("div", {}, where, element("h3", { className: "name" }, glyph(sae.architecture), element("span", {}, kind),
      ...rest.filter(Boolean).map(one => element("small", {}, one)))),
    element("dl", { className: "keys" }, ["l0", "ce_recovered", "ce_increase", "dead_fraction"].map(name => keyFigure(sae, name))),
    answer.targets.length ? targetChips(answer.targets) : null,
    HOOKS.length > 4 ? element("details", {}, element("summary", {}, "Because…"), because) : because,
    sae.remedy ? element("p", { className: "soft" }, `For the missed targets: ${sae.remedy}.`) : null,
    element("div", { className: "foot" },
      also.length ? element("div", { className: "instead" }, also) : null,
      copyable(sae.command, `the command that fetches ${sae.called}`), element("div", {}, open)));
}

// ---- filters --------------------------------------------------------------------------------------------------------

function chip(name, checked, change, kind, ...label) {
  const box = element("input", { type: "checkbox", checked, value: name });
  box.addEventListener("change", () => { change(box.checked); apply(); });
  return element("label", { className: `chip ${kind}`.trim(), title: name }, box, ...label);
}

function field(label, input) {
  return element("label", { className: "field" }, element("span", {}, label), input);
}

function group(label, ...inputs) {
  return element("div", { className: "field", role: "group", ariaLabel: label },
    element("span", { ariaHidden: "true" }, label), element("div", { className: "group" }, ...inputs));
}

function toggled(set, name) {
  return on => { if (on) set.delete(name); else set.add(name); };
}

function drawFilters() {
  const form = byId("filters"), parts = [];
  if (HOOKS.length > 1) {
    const select = element("select", { id: "hook" }, element("option", { value: "" }, "all hook points"),
      HOOKS.map(name => element("option", { value: name, selected: name === STATE.hook }, name)));
    select.addEventListener("change", () => { STATE.hook = select.value; apply(); });
    const made = field("Hook point", select);
    made.classList.add("hook");
    parts.push(made);
  }
  const count = name => SAES.filter(sae => ARCHITECTURES[sae.architecture].name === name).length;
  parts.push(group("Architecture", ARCHITECTURES.map(({ name }, index) => chip(name, !STATE.off.has(name),
    toggled(STATE.off, name), "", glyph(index), element("span", {}, name), element("small", {}, String(count(name)))))));
  if (statuses().length > 1)
    parts.push(group("Status", statuses().map(name => chip(name, !STATE.gone.has(name), toggled(STATE.gone, name), "",
      element("span", {}, name || "unknown"), element("small", {}, String(SAES.filter(sae => sae.status === name).length))))));
  const ends = [["low", "from"], ["high", "to"]].map(([end, label]) => {
    const input = element("input", { type: "text", inputMode: "decimal", id: `l0-${end}`, placeholder: label,
      ariaLabel: `L0 ${label}`, value: STATE[end] ?? "" });
    input.addEventListener("input", () => { STATE[end] = positive(input.value); apply(); });
    return input;
  });
  const band = DATA.band ? element("button", { type: "button", className: "quiet", id: "band" }, "The band") : null;
  band?.addEventListener("click", () => {
    [STATE.low, STATE.high] = DATA.band;
    drawFilters();
    apply();
    byId("band").focus();
  });
  parts.push(group("L0", ends, band));
  parts.push(group("Front", chip("front", STATE.front, on => { STATE.front = on; }, "yes", element("span", {}, "on it only"))));
  const words = element("input", { type: "search", id: "search", value: STATE.words, placeholder: "settings, ids" });
  words.addEventListener("input", () => { STATE.words = words.value; apply(); });
  parts.push(field("Search", words));
  form.replaceChildren(...parts);
  byId("y").replaceChildren(...Y_AXES.map(axis => element("option", { value: axis.name, selected: axis.name === STATE.y }, axis.label)));
}

function apply() {
  drawTable();
  drawPanels();
  const seen = ordered.length, place = byId("count");
  place.replaceChildren(seen === SAES.length ? `All ${seen} shown` : `${seen} of ${SAES.length} shown`);
  if (seen < SAES.length || STATE.hook !== "") {
    const all = element("button", { type: "button", className: "link", id: "show-all" }, "Show all");
    all.addEventListener("click", () => {
      Object.assign(STATE, { hook: "", off: new Set(), gone: new Set(), low: null, high: null, front: false, words: "" });
      drawFilters();
      apply();
      (byId("hook") ?? byId("search")).focus();
    });
    place.append(all);
  }
  remember();
}

function drawPanels() {
  const axis = yAxis(), seen = SAES.filter(sae => passes(sae) && evaluated(sae) && yOf(axis, sae.figures[axis.figure]) !== null);
  const range = limits(axis, seen);
  for (const panel of panels) {
    panel.root.hidden = STATE.hook !== "" && HOOKS[panel.hook] !== STATE.hook;
    if (!panel.root.hidden) panel.draw(range, seen);
  }
}

function drawLegend() {
  const line = (kind, dashes, label) => element("li", {}, drawn("svg", { viewBox: "0 0 26 14", class: "plot-key", "aria-hidden": "true" },
    keyLine(kind, dashes)), label);
  const keyLine = (kind, dashes) => {
    const made = drawn("path", { d: "M0 7h26", "stroke-width": 1.8, "stroke-dasharray": dashes, fill: "none" });
    made.style.stroke = `var(--${kind})`;
    return made;
  };
  const dot = filled => {
    const made = drawn("circle", { cx: 13, cy: 7, r: 4.6, "stroke-width": 1.7 });
    made.style.fill = filled ? "var(--grey)" : "none";
    made.style.stroke = filled ? "var(--ink)" : "var(--grey)";
    return drawn("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, made);
  };
  const items = [element("li", {}, dot(true), "on the front of its hook point"), element("li", {}, dot(false), "not on it"),
    line("ink", null, "the front")];
  if (SAES.some(sae => sae.intervals.ce_recovered || sae.intervals.l0)) {
    const bars = drawn("path", { d: "M13 1V13M6 7H20", "stroke-width": 1.5, fill: "none" });
    bars.style.stroke = "var(--grey)";
    items.push(element("li", {}, drawn("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, bars), "95% interval over documents"));
  }
  if (SAES.some(sae => sae.seeds !== null)) {
    const band = drawn("path", { d: "M3 7H23", "stroke-width": 6, "stroke-linecap": "round", "stroke-opacity": 0.35 });
    band.style.stroke = "var(--grey)";
    items.push(element("li", {}, drawn("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, band), "seeds of the same settings"));
  }
  for (const [label, dashes] of new Map(DATA.baselines.map(one => [one.label, one.dashes]))) items.push(line("grey", dashes, label));
  if (DATA.band) {
    const box = drawn("rect", { width: 26, height: 14, rx: 2, "stroke-width": 1 });
    box.style.fill = "var(--band)";
    box.style.stroke = "var(--line)";
    items.push(element("li", {}, drawn("svg", { viewBox: "0 0 26 14", "aria-hidden": "true" }, box), bandText()));
  }
  byId("legend").replaceChildren(...items);
  byId("legend").after(element("p", { className: "hint" },
    "Up and to the left is better. Point at an SAE for its figures, click it for the rest; with the keyboard, Tab into a plot, arrow keys, Enter."));
}

function bandText() {
  const [low, high] = DATA.band;
  return high === null ? `L0 band: ${text(low)} or more` : `L0 band: ${text(low)} to ${text(high)}`;
}

// ---- between hook points, baselines ---------------------------------------------------------------------------------

function plainTable(heads, rows) {
  return element("div", { className: "scroll fit", tabIndex: 0, role: "region", ariaLabel: heads.map(head => head[0]).join(", ") },
    element("table", {}, element("thead", {}, element("tr", {}, heads.map(([label, numeric]) =>
      element("th", { scope: "col", className: numeric ? "number" : "" }, label)))),
    element("tbody", {}, rows.map(cells => element("tr", {}, cells.map((cell, index) =>
      element(index ? "td" : "th", { className: [heads[index][1] ? "number" : "", heads[index][2] ?? ""].join(" ").trim(),
        ...(index ? {} : { scope: "row" }) }, cell)))))));
}

function drawBetween() {
  const picked = DATA.answers.filter(answer => answer.key !== null).map(answer => BY_KEY.get(answer.key));
  const losses = new Map(DATA.losses.map(loss => [loss.hook, loss]));
  if (picked.length < 2 || !picked.some(sae => "ce_increase" in sae.figures)) return byId("between").remove();
  const most = Math.max(...picked.map(sae => sae.figures.ce_increase ?? 0));
  const rows = picked.map(sae => {
    const loss = losses.get(sae.hook), increase = sae.figures.ce_increase;
    const bar = element("span", { className: "bar", ariaHidden: "true" });
    if (increase > 0) bar.style.width = `${(90 * increase / most).toFixed(1)}px`;
    return [HOOKS[sae.hook], [glyph(sae.architecture), " ", saeLink(sae.key, sae.called)], shown(sae, "l0"),
      [increase > 0 ? bar : null, shown(sae, "ce_increase"), element("small", {}, interval(sae, "ce_increase"))],
      shown(sae, "ce_recovered"), loss ? text(loss.ablated - loss.clean, 4) : "–", loss ? text(loss.clean, 4) : "–"];
  });
  byId("between").append(element("h2", { id: "between-title" }, "Between hook points"),
    element("p", { className: "soft lead" }, "CE recovered is a share of what ablating a hook point costs, which differs between hook points: "
      + "compare these by the CE increase, in nats a token. The one to take at each:"),
    plainTable([["hook point", false, "mono"], ["SAE"], ["L0", true], ["CE increase (nats)", true], ["CE recovered", true],
      ["of what ablation costs", true], ["CE of the model", true]], rows), overallFront());
}

function overallFront() {
  const front = SAES.filter(sae => sae.overall).sort((a, b) => a.figures.l0 - b.figures.l0);
  if (!front.length) return "";
  const rows = front.map(sae => [HOOKS[sae.hook], [glyph(sae.architecture), " ", saeLink(sae.key, sae.called)], shown(sae, "l0"),
    [shown(sae, "ce_increase"), element("small", {}, interval(sae, "ce_increase"))]]);
  return element("details", {}, element("summary", {}, `The front over all hook points, L0 against CE increase: ${saesOf(front.length)}`),
    plainTable([["hook point", false, "mono"], ["SAE"], ["L0", true], ["CE increase (nats)", true]], rows));
}

const saesOf = count => count === 1 ? "1 SAE" : `${count} SAEs`;

function drawBaselines() {
  if (!DATA.beaten.length) return byId("baselines").remove();
  const met = DATA.beaten.filter(row => row.ahead !== null), won = met.filter(row => row.ahead > 0).length;
  const rows = DATA.beaten.map(row => [HOOKS[row.hook], row.label, text(row.k), text(row.l0, 2), text(row.ce_recovered, 4),
    row.reference ? "it sees the target" : row.key === null ? "none" : saeLink(row.key, BY_KEY.get(row.key).called),
    row.ahead === null ? "" : element("span", { className: row.ahead > 0 ? "better" : "worse" }, `${row.ahead > 0 ? "+" : ""}${text(row.ahead, 4)}`)]);
  const references = DATA.beaten.some(row => row.reference) ? " A basis of the target is no rival: it sees the very activations "
    + "that a transcoder has to predict, and shows how much so many coefficients of them are worth." : "";
  byId("baselines").append(element("h2", { id: "baselines-title" }, "Baselines"),
    element("p", { className: "soft lead" }, `Beside each baseline the SAE that recovers the most with no more active latents: it is ahead in ${won} of ${met.length} comparisons.${references}`),
    element("details", { open: rows.length <= 8 }, element("summary", {}, `${met.length === 1 ? "The comparison" : "Every comparison"}`),
      plainTable([["hook point", false, "mono"], ["baseline"], ["k", true], ["L0", true], ["CE recovered", true],
        ["best SAE, no more L0"], ["ahead by", true]], rows)));
}

// ---- cost, protocol, spec -------------------------------------------------------------------------------------------

function pairs(list) {
  return element("dl", { className: "pairs" }, list.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function drawCost() {
  const { phases, total, figures } = DATA.cost, place = byId("cost");
  if (!figures.length) return place.remove();
  place.append(element("h2", { id: "cost-title" }, "Cost"));
  const kind = index => `p${phases[index][0] === "other" ? 5 : index % 5}`;
  if (phases.length) {
    const bar = element("div", { className: "phases", role: "img", ariaLabel: `Time by phase: ${phases.map(([name, spent]) => `${name} ${seconds(spent)}`).join(", ")}` },
      phases.map(([name, spent], index) => {
        const part = element("span", { className: kind(index), title: `${name}: ${seconds(spent)}` });
        part.style.flex = `${Math.max(spent, 0)} 0 0`;
        return part;
      }));
    place.append(bar, element("ul", { className: "phase-names" }, phases.map(([name, spent], index) => element("li", {},
      element("i", { className: kind(index) }), `${name} `, element("b", {}, seconds(spent)),
      element("span", { className: "soft" }, ` ${text(100 * spent / total, 0)}%`)))));
  }
  const named = { sae_tokens: "SAE-tokens trained", sae_tokens_per_second: "SAE-tokens a second", forward_passes: "forward passes",
    harvested_tokens: "tokens harvested", evaluated_tokens: "tokens evaluated", seconds_total: "seconds in all" };
  const amount = value => text(value, Number.isInteger(value) || value >= 1000 ? 0 : 1);
  const lead = figures.filter(([name]) => name in named || /prun|saved|spared/.test(name));
  const rest = figures.filter(one => !lead.includes(one));
  const words = ([name, value]) => [named[name] ?? name.replaceAll("_", " "), amount(value)];
  place.append(pairs(lead.map(words)));
  if (rest.length) place.append(element("details", {}, element("summary", {}, `${rest.length} more figures`), pairs(rest.map(words))));
}

function drawRest() {
  const place = byId("protocol");
  place.append(element("h2", { id: "protocol-title" }, "How this was measured"));
  if (DATA.protocol.length) place.append(pairs(DATA.protocol));
  if (DATA.losses.length)
    place.append(element("details", {}, element("summary", {}, "The model's loss, clean and ablated"),
      plainTable([["hook point", false, "mono"], ["CE of the model (nats a token)", true], ["CE with the hook point ablated", true]],
        DATA.losses.map(loss => [HOOKS[loss.hook], text(loss.clean, 4), text(loss.ablated, 4)]))));
  if (DATA.provenance.length)
    place.append(element("details", {}, element("summary", {}, "Where this comes from"), pairs(DATA.provenance)));
  if (DATA.spec) {
    const block = element("pre", { className: "yaml", tabIndex: 0 }, DATA.spec);
    const button = element("button", { type: "button", className: "quiet" }, "Copy the spec");
    button.addEventListener("click", async () => say(await copied(DATA.spec, block) ? "Copied the spec" : "Selected the spec"));
    place.append(element("details", {}, element("summary", {}, "The sweep's spec"), block, element("div", {}, button)));
  }
  if (place.children.length < 2) place.remove();
}

// ---- the start ------------------------------------------------------------------------------------------------------

function restore() {
  recall();
  byId("all-columns").checked = STATE.wide;
  drawFilters();
  const key = STATE.sae;
  apply();
  if (key && STATE.sae === key) openDetail(key);
  else if (byId("detail").open) closeDetail();
}

setTheme(stored() ?? "auto");
byId("facts").append(...DATA.facts.map(([name, value]) => element("li", {}, ["SAEs", "status", "ended"].includes(name) ? value : `${name} ${value}`)));
byId("answers").append(...DATA.answers.map(answerCard));
if (!DATA.answers.length) byId("answers").append(element("p", { className: "soft" }, "This sweep has no SAEs."));
byId("panels").append(...panels.map(panel => panel.root));
drawLegend();
drawBetween();
drawBaselines();
drawCost();
drawRest();
restore();

byId("y").addEventListener("change", event => { STATE.y = event.target.value; apply(); });
byId("filters").addEventListener("submit", event => event.preventDefault());
byId("all-columns").addEventListener("change", event => { STATE.wide = event.target.checked; drawTable(); remember(); });
byId("skip").addEventListener("click", event => { event.preventDefault(); byId("saes").focus(); byId("table").scrollIntoView(); });
byId("detail").addEventListener("close", closed);
byId("detail").addEventListener("click", event => { if (event.target === byId("detail")) closeDetail(); });
document.addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", () => { if (!panels.some(panel => panel.rest())) hideTip(); }, { passive: true });
addEventListener("hashchange", restore);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  hideTip();
  drawPanels();
  if (byId("detail").open) drawSmall();
});
