// The page without this shows everything; with it the heat maps have a slider, pictures open large, charts answer.
(function () {
  "use strict";
  const $ = (id) => document.getElementById(id);
  document.documentElement.classList.add("script");

  // Heat maps: the cells of all maps in the order of the numbers, layer by layer, task by task.
  function startHeatMaps() {
    const source = $("heat-data");
    if (!source) return;
    const data = JSON.parse(source.textContent);
    const cells = [...document.querySelectorAll(".maps rect")];
    const places = new Map(cells.map((cell, i) => [cell, i]));
    const slider = $("heat-step"), kind = $("heat-kind");
    const level = (value, top) => Math.min(data.colors.length - 1, Math.round(Math.sqrt(value / top) * (data.colors.length - 1)));
    const percent = (value) => Number((100 * value).toPrecision(3)) + " %";
    const values = () => data.values[kind.value][Number(slider.value)];
    function paint() {
      const top = data.tops[kind.value], shown = values();
      cells.forEach((cell, i) => cell.setAttribute("fill", data.colors[level(shown[i] / data.unit, top)]));
      $("heat-label").textContent = data.labels[Number(slider.value)];
      slider.setAttribute("aria-valuetext", data.labels[Number(slider.value)]);
      $("heat-top").textContent = percent(top);
    }
    function tell(event) {
      const i = places.get(event.target);
      if (i === undefined) return;
      const tasks = data.tasks.length, expert = i % data.experts, row = Math.floor(i / data.experts);
      const where = "layer " + (Math.floor(row / tasks) + 1) + ", " + data.tasks[row % tasks] + ", expert " + expert;
      $("heat-readout").textContent = where + ": " + percent(values()[i] / data.unit);
    }
    slider.addEventListener("input", paint);
    kind.addEventListener("change", paint);
    document.querySelector(".maps").addEventListener("pointermove", tell);
    document.querySelector(".maps").addEventListener("pointerdown", tell);
    slider.value = slider.max; // a browser that goes back to the page may remember another
    paint();
  }

  // Pictures: all that enlarge are one series, to be leafed through at the same place and size.
  function startViewer() {
    const viewer = $("viewer"), image = $("viewer-image"), stage = document.querySelector(".stage");
    const place = (button, i) => (button.dataset.order === undefined ? i : Number(button.dataset.order));
    const buttons = [...document.querySelectorAll(".enlarge")].map((button, i) => [place(button, i), button]);
    const pictures = buttons.sort((one, two) => one[0] - two[0]).map((pair) => pair[1].firstElementChild);
    let shown = 0;
    function show(i) {
      shown = Math.max(0, Math.min(pictures.length - 1, i));
      image.src = pictures[shown].src;
      image.alt = $("viewer-caption").textContent = pictures[shown].alt;
      $("viewer-back").disabled = shown === 0;
      $("viewer-next").disabled = shown === pictures.length - 1;
    }
    function fit(isFitted) {
      stage.classList.toggle("fit", isFitted);
      $("viewer-fit").textContent = isFitted ? "Full size" : "Fit";
    }
    pictures.forEach((picture, i) => picture.parentElement.addEventListener("click", () => {
      show(i);
      fit(false);
      viewer.showModal();
      stage.scrollTo(0, 0);
    }));
    $("viewer-back").addEventListener("click", () => show(shown - 1));
    $("viewer-next").addEventListener("click", () => show(shown + 1));
    $("viewer-fit").addEventListener("click", () => fit(!stage.classList.contains("fit")));
    image.addEventListener("click", () => fit(!stage.classList.contains("fit")));
    $("viewer-close").addEventListener("click", () => viewer.close());
    viewer.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft" && !event.altKey) show(shown - 1);
      if (event.key === "ArrowRight" && !event.altKey) show(shown + 1);
    });
  }

  // Charts: the nearest point of every curve with a name, in the place of the latest value.
  function startChart(figure) {
    const svg = figure.querySelector("svg"), output = figure.querySelector(".value");
    const data = JSON.parse(figure.dataset.chart);
    const note = figure.querySelector(".note"), words = note.textContent;
    const [left, right, width] = data.box, named = data.lines.filter((line) => line[1].length);
    if (!named.length) return;
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cross.setAttribute("class", "cross");
    function nearest(points, step) {
      return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
    }
    function move(event) {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * width - left) / (right - left);
      const wanted = data.x[0] + Math.max(0, Math.min(1, share)) * (data.x[1] - data.x[0]);
      const step = nearest(named.flatMap((line) => line[1]), wanted)[0];
      const x = left + (step - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
      cross.setAttribute("d", "M" + x + " 4V166");
      svg.append(cross);
      const told = named.map((line) => (named.length > 1 ? line[0] + " " : "") + nearest(line[1], step)[1]);
      if (output && named.length === 1) output.textContent = told[0];
      note.textContent = "step " + step.toLocaleString("en") + (named.length > 1 || !output ? ": " + told.join(", ") : "");
    }
    function leave() {
      cross.remove();
      if (output) output.textContent = output.dataset.latest;
      note.textContent = words;
    }
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
  }

  // Links into a fold open it; paper has all folds open.
  function openTarget() {
    const target = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  }
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((fold) => { fold.open = false; }));
  addEventListener("hashchange", openTarget);

  startHeatMaps();
  startViewer();
  document.querySelectorAll(".chart").forEach(startChart);
  openTarget();
})();
