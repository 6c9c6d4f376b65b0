// Before the page is painted, so that it does not flash in the wrong colours.
try {
  const chosen = localStorage.getItem("shape-moe-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // no storage for files in this browser: the theme is not remembered
}
