"use strict";
const { panels, marks } = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const table = byId("saes"), rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
const switches = [...document.querySelectorAll("input[name=architecture]")];
const dark = matchMedia("(prefers-color-scheme: dark)");
let picked = "", sorted = "";

// ---- text: everything from the sweep goes through textContent, never through markup ---------------------------------

function element(tag, options = {}, ...children) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
}

function head(mark, id) {
  const made = element("div", { className: "mark-head" }, element("b", {}, mark.title),
    element("span", { className: "name" }, mark.hook_point), element("span", { className: "name" }, id),
    element("span", {}, mark.note));
  made.style.setProperty("--mark", mark.colour);
  return made;
}

function groups(mark) {
  const named = [["figures", mark.figures], ["settings", mark.settings], ["also measured", mark.measured]];
  return element("div", { className: "groups" }, ...named.filter(([, pairs]) => pairs.length).map(([title, pairs]) =>
    element("div", { className: pairs.length > 8 ? "group long" : "group" }, element("h4", {}, title),
      ...pairs.flatMap(([name, value]) => [breakable(name), element("b", {}, value)]))));
}

function breakable(name) {
  const parts = name.split(/(?<=_)/);
  return element("span", {}, ...parts.flatMap((part, index) => index ? [element("wbr"), part] : [part]));
}

// ---- the panels -----------------------------------------------------------------------------------------------------

const plots = panels.map(panel => {
  const plot = element("div", { className: "plot" });
  byId("panels").append(element("section", { className: "panel" }, element("h3", {}, panel.hook_point), plot));
  return plot;
});

function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  return JSON.parse(JSON.stringify(figure).replace(/"var\((--[a-z]+)\)"/g,
    (_, name) => JSON.stringify(style.getPropertyValue(name).trim())));
}

const config = {
  displaylogo: false, responsive: true, displayModeBar: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

function draw() {
  const shown = new Set(rows.filter(row => !row.hidden).map(row => row.dataset.sae));
  panels.forEach((panel, index) => {
    const { data, layout } = themed(panel);
    for (const trace of data)
      if (trace.unselected && shown.size < rows.length)
        trace.selectedpoints = trace.customdata.flatMap((id, position) => shown.has(id) ? [position] : []);
    const mark = marks[picked];
    if (mark && mark.hook_point === panel.hook_point && mark.y !== null)
      data.push(themed({ type: "scatter", mode: "markers", x: [mark.x], y: [mark.y], hoverinfo: "skip", marker:
        { symbol: "circle-open", size: 24, color: "var(--link)", line: { width: 2.5 } } }));
    Plotly.react(plots[index], data, layout, config);
  });
}

function listen(plot) {
  plot.on("plotly_hover", event => {
    const key = event.points[0].customdata, mark = marks[key], tip = byId("tip");
    if (!mark) return;
    tip.replaceChildren(head(mark, mark.commands.length ? key : ""), groups(mark));
    tip.hidden = false;
    const { clientX: x, clientY: y } = event.event, box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, x + 18 + box.width < innerWidth ? x + 18 : x - 18 - box.width)}px`;
    tip.style.top = `${Math.max(8, Math.min(y - 40, innerHeight - box.height - 8))}px`;
  });
  plot.on("plotly_unhover", () => { byId("tip").hidden = true; });
  plot.on("plotly_click", event => {
    const key = event.points[0].customdata;
    if (rows.some(row => row.dataset.sae === key)) pick(key, true);
  });
}

// ---- one SAE --------------------------------------------------------------------------------------------------------

function pick(id, reveal = false) {
  picked = marks[id] && id !== picked ? id : "";
  byId("tip").hidden = true;
  for (const row of rows) {
    row.classList.toggle("picked", row.dataset.sae === picked);
    if (reveal && row.dataset.sae === picked)
      table.parentElement.scrollTop = row.offsetTop - table.parentElement.clientHeight / 2;
  }
  const drawer = byId("drawer"), mark = marks[picked];
  drawer.hidden = !mark;
  if (mark) {
    const close = element("button", { id: "close", type: "button", title: "close (Escape)", onclick: () => pick("") }, "✕");
    drawer.replaceChildren(close, head(mark, picked), ...mark.commands.map(command), groups(mark));
    drawer.scrollTop = 0;
  }
  document.body.style.paddingBottom = mark ? `${drawer.offsetHeight + 24}px` : "";
  draw();
  remember();
}

function command([title, text]) {
  const label = `copy to ${title}`;
  const button = element("button", { type: "button", title: label, ariaLabel: label }, "copy");
  const shown = element("pre", {}, text);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no clipboard for this page: leave it marked, for Ctrl-C
      getSelection().selectAllChildren(shown);
      button.textContent = document.execCommand("copy") ? "copied" : "marked";
      return;
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  return element("div", { className: "command" }, shown, button);
}

// ---- sort and filter ------------------------------------------------------------------------------------------------

function sort(by) {
  const down = by.startsWith("-"), column = heads.findIndex(head => head.dataset.column === by.replace(/^-/, ""));
  if (column < 0) return;
  sorted = by;
  heads.forEach((head, index) => index === column
    ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
  const key = row => row.cells[column].dataset.value;
  const numeric = heads[column].classList.contains("number");
  const compare = (a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    const order = numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true });
    return down ? -order : order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  remember();
}

function filter() {
  const off = new Set(switches.filter(box => !box.checked).map(box => box.value));
  const hook = byId("hook-point")?.value ?? "", words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const low = parseFloat(byId("l0-low").value), high = parseFloat(byId("l0-high").value);
  for (const row of rows) {
    const mark = marks[row.dataset.sae], l0 = cell(row, "l0");
    const text = [row.dataset.sae, mark.title, mark.hook_point, mark.note, ...mark.settings.map(pair => pair.join("="))]
      .join(" ").toLowerCase();
    const outside = (low > 0 || high > 0) && (l0 === "" || l0 < low || l0 > high);
    row.hidden = off.has(mark.architecture) || (hook && mark.hook_point !== hook) || outside
      || (byId("front-only").checked && !row.classList.contains("front")) || !words.every(word => text.includes(word));
  }
  plots.forEach((plot, index) => { plot.parentElement.hidden = hook !== "" && panels[index].hook_point !== hook; });
  const shown = rows.filter(row => !row.hidden).length;
  byId("count").textContent = shown < rows.length ? `${shown} of ${rows.length} SAEs` : `${rows.length} SAEs`;
  byId("show-all").hidden = shown === rows.length && hook === "";
  draw();
}

function cell(row, name) {
  return row.cells[heads.findIndex(head => head.dataset.column === name)].dataset.value;
}

// ---- the address keeps what is sorted and picked, so that a link shows the same -------------------------------------

function remember() {
  const state = Object.entries({ sort: sorted, sae: picked }).filter(([, value]) => value);
  const hash = state.length ? `#${new URLSearchParams(state)}` : location.pathname + location.search;
  history.replaceState(null, "", hash);
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  if (state.get("sort")) sort(state.get("sort"));
  if (state.get("sae") && state.get("sae") !== picked) pick(state.get("sae"), true);
}

heads.forEach(head => head.firstChild.addEventListener("click", () =>
  sort(sorted === head.dataset.column ? `-${sorted}` : head.dataset.column)));
table.tBodies[0].addEventListener("click", event => {
  if (getSelection().isCollapsed) pick(event.target.closest("tr").dataset.sae);
});
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("submit", event => event.preventDefault());
byId("show-all").addEventListener("click", () => { byId("filters").reset(); filter(); });
byId("all-columns").addEventListener("change", event => table.classList.toggle("wide", event.target.checked));
document.addEventListener("keydown", event => { if (event.key === "Escape" && picked) pick(""); });
dark.addEventListener("change", draw);
addEventListener("hashchange", restore);
filter();
plots.forEach(listen);
restore();
