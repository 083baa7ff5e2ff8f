"use strict";
// The numbers under the pointer, in one plot; the same moment, in all of them.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const plots = [...document.querySelectorAll("svg[data-plot]")];
const [width, left, right] = data.frame;

function show(event) {
  const svg = event.currentTarget;
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * width;
  const count = data.times.length;
  const share = (x - left) / (width - left - right);
  if (share < 0 || share > 1 || !count) return hide();
  const i = Math.min(count - 1, Math.floor(share * count));
  const at = left + ((i + 0.5) / count) * (width - left - right);
  for (const each of plots) {
    const cross = each.querySelector(".cross");
    cross.setAttribute("transform", `translate(${at} 0)`);
    cross.style.visibility = "visible";
  }
  const plot = data.plots[svg.dataset.plot];
  const lines = plot.names.map((name, k) => {
    const value = plot.values[k][i];
    return `${name}  ${value === null ? "–" : value.toFixed(plot.digits)}`;
  });
  tip.textContent = [`${data.times[i]}  (${plot.unit})`, ...lines].join("\n");
  tip.hidden = false;
  const beyond = event.clientX + tip.offsetWidth + 24 > innerWidth;
  tip.style.left = `${event.clientX + (beyond ? -tip.offsetWidth - 14 : 14)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

function hide() {
  tip.hidden = true;
  for (const each of plots) each.querySelector(".cross").style.visibility = "hidden";
}

// Of what was decided, only what has all the words.
const rows = [...document.querySelectorAll("#history tbody tr")].map((row) => ({
  row,
  text: row.textContent.toLowerCase(),
}));
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const { row, text } of rows) {
    row.hidden = !words.every((word) => text.includes(word));
    count += !row.hidden;
  }
  document.getElementById("shown").textContent = `${count} of ${rows.length}`;
});

for (const svg of plots) {
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", hide);
}
