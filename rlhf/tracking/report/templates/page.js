"use strict";
const list = document.getElementById("pairs");
if (list) {
  const articles = Array.from(list.children);
  const [search, order, plain, count] = ["search", "order", "plain", "count"].map((id) => document.getElementById(id));
  const keys = {
    index: (a) => Number(a.dataset.index),
    gain: (a) => -Number(a.dataset.gained),
    lose: (a) => Number(a.dataset.gained),
  };
  const show = () => {
    const wanted = search.value.toLowerCase();
    const key = keys[order.value];
    articles.sort((a, b) => key(a) - key(b));
    articles.forEach((a) => { a.hidden = !a.textContent.toLowerCase().includes(wanted); });
    list.append(...articles);
    list.classList.toggle("unmarked", plain.checked);
    count.value = `${articles.filter((a) => !a.hidden).length} shown`;
  };
  const form = document.getElementById("controls");
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
