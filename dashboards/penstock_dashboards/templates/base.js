// The report's data, and how it is put into words.

const DATA = JSON.parse(document.getElementById("data").textContent);
const { saes: SAES, hooks: HOOKS, architectures: ARCHITECTURES, figures: FIGURES } = DATA;
const BY_KEY = new Map(SAES.map(sae => [sae.key, sae]));
const FIGURE = new Map(FIGURES.map(figure => [figure.name, figure]));
const ANSWERS = new Map(DATA.answers.map(answer => [answer.hook, answer]));

// ---- figures -------------------------------------------------------------------------------------------------------

const shown = (sae, name) => text(sae.figures[name], FIGURE.get(name)?.decimals ?? null);

function interval(sae, name) {
  const bounds = sae.intervals[name];
  if (!bounds) return "";
  const decimals = FIGURE.get(name)?.decimals ?? null;
  return `[${text(bounds[0], decimals)}, ${text(bounds[1], decimals)}]`;
}

// ---- marks ----------------------------------------------------------------------------------------------------------

const SHAPES = {  // around the origin, of about equal area
  circle: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
  square: "M-4.5-4.5h9v9h-9z",
  triangle: "M0-5.8 5.6 4.4h-11.2z",
  "triangle-down": "M0 5.8 5.6-4.4h-11.2z",
  diamond: "M0-6.2 6.2 0 0 6.2-6.2 0z",
  plus: "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  cross: "M-3.4-6 0-2.6 3.4-6 6-3.4 2.6 0 6 3.4 3.4 6 0 2.6-3.4 6-6 3.4-2.6 0-6-3.4z",
  pentagon: "M0-5.8 5.6-1.7 3.4 4.9h-6.8L-5.6-1.7z",
  hexagon: "M0-5.8 5.1-2.9v5.8L0 5.8-5.1 2.9v-5.8z",
};

ARCHITECTURES.forEach((architecture, index) =>
  document.documentElement.style.setProperty(`--mark-${index}`, `light-dark(${architecture.light}, ${architecture.dark})`));
const colour = index => `var(--mark-${index})`;

function markPath(index, filled) {
  const path = drawn("path", { d: SHAPES[ARCHITECTURES[index].shape] ?? SHAPES.circle, "vector-effect": "non-scaling-stroke" });
  path.style.fill = filled ? colour(index) : "var(--paper)";
  path.style.stroke = colour(index);
  return path;
}

function glyph(index, filled = true) {
  const made = drawn("svg", { class: "glyph", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, markPath(index, filled));
  made.firstChild.style.strokeWidth = "1.6px";
  return made;
}

// ---- what is filtered, sorted and opened: kept in the address, so that a link shows the same --------------------------

const STATE = { hook: "", off: new Set(), low: null, high: null, band: false, front: false, gone: new Set(), words: "",
                sort: "", wide: false, y: "lost", sae: "" };

function remember() {
  const parts = new URLSearchParams();
  if (STATE.hook !== "") parts.set("hook", STATE.hook);
  if (STATE.off.size) parts.set("arch", ARCHITECTURES.map(one => one.name).filter(name => !STATE.off.has(name)).join(","));
  if (STATE.low !== null || STATE.high !== null) parts.set("l0", `${STATE.low ?? ""}:${STATE.high ?? ""}`);
  if (STATE.gone.size) parts.set("status", statuses().filter(name => !STATE.gone.has(name)).join(","));
  if (STATE.front) parts.set("front", "1");
  if (STATE.words) parts.set("q", STATE.words);
  if (STATE.sort) parts.set("sort", STATE.sort);
  if (STATE.wide) parts.set("columns", "all");
  if (STATE.y !== "lost") parts.set("y", STATE.y);
  if (STATE.sae) parts.set("sae", STATE.sae);
  const hash = String(parts);
  try {
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  } catch {}  // a frame without an address of its own
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const listed = name => parts.has(name) ? new Set(parts.get(name).split(",")) : null;
  STATE.hook = HOOKS.includes(parts.get("hook")) ? parts.get("hook") : "";
  const on = listed("arch"), there = listed("status");
  STATE.off = new Set(on ? ARCHITECTURES.map(one => one.name).filter(name => !on.has(name)) : []);
  STATE.gone = new Set(there ? statuses().filter(name => !there.has(name)) : []);
  [STATE.low, STATE.high] = (parts.get("l0") ?? ":").split(":").map(positive);
  STATE.front = parts.get("front") === "1";
  STATE.words = parts.get("q") ?? "";
  STATE.sort = parts.get("sort") ?? "";
  STATE.wide = parts.get("columns") === "all";
  STATE.y = Y_AXES.some(axis => axis.name === parts.get("y")) ? parts.get("y") : "lost";
  STATE.sae = BY_KEY.has(parts.get("sae")) ? parts.get("sae") : "";
}

function positive(given) {
  const value = parseFloat(given);
  return Number.isFinite(value) && value >= 0 ? value : null;
}

const statuses = () => [...new Set(SAES.map(sae => sae.status))];

function passes(sae) {
  const l0 = sae.figures.l0;
  if (STATE.hook !== "" && HOOKS[sae.hook] !== STATE.hook) return false;
  if (STATE.off.has(ARCHITECTURES[sae.architecture].name) || STATE.gone.has(sae.status)) return false;
  if (STATE.front && !sae.front) return false;
  if ((STATE.low !== null || STATE.high !== null)
      && (l0 === undefined || l0 < (STATE.low ?? 0) || l0 > (STATE.high ?? Infinity))) return false;
  return STATE.words.toLowerCase().split(/\s+/).filter(Boolean).every(word => searched(sae).includes(word));
}

function searched(sae) {
  sae.searched ??= [sae.key, sae.called, HOOKS[sae.hook], sae.status, sae.missed,
    ...Object.entries(sae.settings).map(pair => pair.join("="))].join(" ").toLowerCase();
  return sae.searched;
}
