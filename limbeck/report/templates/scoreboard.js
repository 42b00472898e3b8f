"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const table = $("methods");
  const entries = [...table.querySelectorAll("tbody.entry")];
  const headings = [...table.tHead.rows[0].cells];
  const search = $("search"), verdict = $("verdict"), family = $("family");

  // ---- sorting: the first click sorts text from A and numbers from the largest; what has no value stays last
  function sortBy(column, way) {
    const number = headings[column].querySelector("button").dataset.kind === "number";
    const sign = way === "ascending" ? 1 : -1;
    const value = (entry) => entry.rows[0].cells[column].dataset.sort;
    const sorted = [...entries].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (number ? x - y : x.localeCompare(y, "en", { numeric: true, sensitivity: "base" }));
    });
    headings.forEach((heading, n) => heading.setAttribute("aria-sort", n === column ? way : "none"));
    table.append(...sorted);
  }
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    button.addEventListener("click", () => {
      const first = button.dataset.kind === "number" ? "descending" : "ascending";
      const now = heading.getAttribute("aria-sort");
      const other = first === "ascending" ? "descending" : "ascending";
      sortBy(column, now === first ? other : first);
    });
  });

  // ---- filters: every word must occur
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const entry of entries) {
      const { text, verdict: v, family: f } = entry.dataset;
      const fits = words.every((w) => text.includes(w)) && (!verdict.value || v === verdict.value) && (!family.value || f === family.value);
      entry.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = `${shown} of ${entries.length}`;
    $("nothing").hidden = shown > 0;
  }
  search.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  family.addEventListener("change", filter);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", () => {
    search.value = verdict.value = family.value = "";
    filter();
    search.focus();
  });

  // ---- details
  function toggle(entry, open = entry.rows[1].hidden) {
    entry.rows[1].hidden = !open;
    entry.classList.toggle("opened", open);
    entry.querySelector("button.open").setAttribute("aria-expanded", open);
  }
  for (const entry of entries) {
    entry.rows[0].addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button || getSelection().isCollapsed) toggle(entry);
    });
  }
  function openNamed() {
    const entry = entries.find((e) => e.id === decodeURIComponent(location.hash.slice(1)));
    if (entry) { toggle(entry, true); entry.scrollIntoView(); }
  }
  addEventListener("hashchange", openNamed);
  openNamed();
  filter(); // a browser may have kept what was typed before a reload
})();
