// How things are put into elements and words, for every page. Text of the data goes into the page as text alone.

const byId = id => document.getElementById(id);

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options))
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  made.append(...children.flat().filter(child => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  made.append(...children.flat());
  return made;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

function text(value, decimals = null) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (decimals !== null) return value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return Number.isInteger(value) ? value.toLocaleString("en", { useGrouping: Math.abs(value) >= 1e5 }) : String(+value.toPrecision(6));
}

function short(value) {  // 1,500,000 as 1.5M
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}${unit}`;
  return String(+value.toPrecision(3));
}

function seconds(value) {
  if (value < 120) return `${text(value, value < 10 ? 1 : 0)} s`;
  return value < 7200 ? `${text(value / 60, 1)} min` : `${text(value / 3600, 1)} h`;
}

// ---- copying, and saying so -----------------------------------------------------------------------------------------

function say(sentence) {
  byId("said").textContent = "";
  setTimeout(() => { byId("said").textContent = sentence; }, 30);
}

function copyable(code, what) {
  const block = element("pre", {}, code);
  const button = element("button", { type: "button", className: "quiet copy-button", ariaLabel: `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    const done = await copied(code, block);
    button.textContent = done ? "Copied" : "Selected";
    say(done ? `Copied ${what}` : `Selected ${what}: press Ctrl+C to copy it`);
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return element("div", { className: "copy" }, block, button);
}

/** Whether it was copied. By way of the selection first: that needs no right that a file or a frame may lack. */
async function copied(code, block) {
  getSelection().selectAllChildren(block);
  try {
    if (document.execCommand("copy")) {
      getSelection().removeAllRanges();
      return true;
    }
  } catch {}
  try {
    await navigator.clipboard.writeText(code);
    return true;
  } catch {
    return false;
  }
}

// ---- beside the pointer --------------------------------------------------------------------------------------------

function showTip(content, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const left = x + 20 + box.width < room ? x + 20 : x - 20 - box.width;
  tip.style.left = `${Math.max(8, Math.min(left, room - box.width - 8))}px`;
  const beside = left >= 8;
  const top = beside ? y - box.height / 2 : y - box.height - 24 > 8 ? y - box.height - 24 : y + 24;
  tip.style.top = `${Math.max(8, Math.min(top, innerHeight - box.height - 8))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

// ---- the theme ------------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
let theme = "auto";

function setTheme(chosen) {
  theme = THEMES.includes(chosen) ? chosen : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
}

function stored(value) {  // where the page may keep nothing, as inside a frame, the choice lasts as long as the page
  try {
    if (value !== undefined) localStorage.setItem("penstock-theme", value);
    return localStorage.getItem("penstock-theme");
  } catch {
    return null;
  }
}

byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  stored(theme);
});
