// The table of all SAEs: what is filtered out is not in it, a click on a column's head sorts.

const NARROW = matchMedia("(max-width: 640px)");  // there the figures come before the hook point
const FIGURE_LEADS = FIGURES.filter(figure => figure.lead);

/** A column: its name, its head, what it sorts by and what a cell shows. */
function columns() {
  const setting = name => ({ name, label: name, numeric: SAES.every(sae => typeof (sae.settings[name] ?? 0) === "number"),
    value: sae => sae.settings[name], cell: sae => name in sae.settings ? text(sae.settings[name]) : "" });
  const figure = one => ({ name: one.name, label: one.label, numeric: true, about: one.about, value: sae => sae.figures[one.name],
    cell: sae => one.name in sae.figures ? [shown(sae, one.name), element("small", {}, interval(sae, one.name))] : "" });
  const plain = (name, label, value) => ({ name, label, numeric: false, value, cell: value });
  const varied = DATA.varied.filter(name => DATA.settings.includes(name));
  const where = HOOKS.length > 1 ? [{ ...plain("hook_point", "hook point", sae => HOOKS[sae.hook]), mono: true }] : [];
  return [
    { name: "called", label: "SAE", numeric: false, value: sae => sae.called, cell: rowHead },
    ...(NARROW.matches ? [] : where),
    ...FIGURE_LEADS.map(figure),
    { ...plain("front", "front", sae => sae.front ? 1 : 0), cell: sae => sae.front ? "on it" : "" },
    ...(NARROW.matches ? where : []),
    ...(statuses().some(status => status && status !== "finished") ? [{ ...plain("status", "status", sae => sae.status), cell: statusCell }] : []),
    ...(DATA.targets ? [plain("missed", "misses", sae => sae.missed)] : []),
    ...(STATE.wide ? [...varied, ...DATA.settings.filter(name => !varied.includes(name))] : varied.filter(name => !DATA.naming.includes(name))).map(setting),
    ...(STATE.wide ? FIGURES.filter(one => !one.lead).map(figure) : []),
    { ...plain("sae_id", "id", sae => sae.key), mono: true },
  ];
}

function statusCell(sae) {
  return element("span", { className: `status ${/^[a-z]+$/.test(sae.status) ? sae.status : ""}` }, sae.status);
}

function rowHead(sae) {
  const button = element("button", { type: "button", className: "link" }, sae.called);
  button.addEventListener("click", event => { event.stopPropagation(); openDetail(sae.key, button); });
  return element("span", {}, glyph(sae.architecture, sae.front), button);
}

let ordered = SAES;
const tableOrder = () => ordered;

function drawTable() {
  const shownColumns = columns(), seen = SAES.filter(passes);
  const sorted = STATE.sort.replace(/^-/, ""), column = shownColumns.find(one => one.name === sorted);
  ordered = column ? seen.slice().sort(comparing(column, STATE.sort.startsWith("-"))) : seen;
  const heads = shownColumns.map(one => {
    const button = element("button", { type: "button", title: one.about ?? "" }, one.label);
    button.dataset.column = one.name;
    button.addEventListener("click", () => {
      const first = FIGURE.has(one.name) && FIGURE.get(one.name).less === false || one.name === "front" ? "-" : "";
      const flipped = STATE.sort.startsWith("-") ? one.name : `-${one.name}`;
      STATE.sort = sorted === one.name ? flipped : `${first}${one.name}`;
      drawTable();
      remember();
      byId("saes").querySelector(`button[data-column="${CSS.escape(one.name)}"]`)?.focus();
      say(`Sorted by ${one.label}, ${STATE.sort.startsWith("-") ? "descending" : "ascending"}`);
    });
    const head = element("th", { scope: "col", className: one.numeric ? "number" : "" }, button);
    head.setAttribute("aria-sort", column === one ? (STATE.sort.startsWith("-") ? "descending" : "ascending") : "none");
    return head;
  });
  const rows = ordered.map(sae => {
    const row = element("tr", { className: sae.key === STATE.sae ? "picked" : "" }, shownColumns.map((one, index) => element(
      index ? "td" : "th", { className: [one.numeric ? "number" : "", one.mono ? "mono" : ""].join(" ").trim(),
        ...(index ? {} : { scope: "row" }) }, one.cell(sae))));
    row.dataset.key = sae.key;
    return row;
  });
  const place = byId("saes"), left = place.scrollLeft;
  place.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows)),
    ...(rows.length ? [] : [element("p", { className: "empty" }, SAES.length ? "No SAE passes the filters." : "This sweep has no SAEs.")]));
  place.scrollLeft = left;
}

function comparing(column, down) {
  const missing = value => value === undefined || value === null || value === "";
  return (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);  // what has no value stays last
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return down ? -order : order;
  };
}

function markPicked() {
  for (const row of byId("saes").querySelectorAll("tbody tr")) row.classList.toggle("picked", row.dataset.key === STATE.sae);
}

NARROW.addEventListener("change", drawTable);
byId("saes").addEventListener("click", event => {
  const row = event.target.closest("tbody tr");
  if (row && getSelection().isCollapsed) openDetail(row.dataset.key, row.querySelector("button"));
});
