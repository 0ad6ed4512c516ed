/* Draws the page "Compare methods" from the JSON that the page holds. No library is used. */
(function () {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 720, HEIGHT = 420, LEFT = 64, RIGHT = 16, TOP = 16, BOTTOM = 52;
  const COLOURS = ["#3b82c4", "#d9772b", "#2f9e74", "#c0579c", "#b08c1a", "#7a6fd6", "#c94f4f", "#5f8fa3"];
  // A family has a shape besides its colour: paths around the origin.
  const SHAPES = ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z", "M-4.5-4.5h9v9h-9z", "M0-6.5L6.5 0L0 6.5L-6.5 0z",
    "M0-6L6 5H-6z", "M0 6L6-5H-6z"];

  function make(name, attributes, ...children) {
    const isSvg = ["svg", "g", "path", "line", "text", "title"].includes(name);
    const made = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const count = (value) => value.toLocaleString("en");
  const share = (value) => value.toFixed(3);

  function described(point) {
    const seeds = `${point.seeds} ${point.seeds === 1 ? "seed" : "seeds"}`;
    const interval = `${share(point.low)} to ${share(point.high)}`;
    return `${point.method}: ${count(point.parameters)} parameters, ${share(point.mean)} (${interval}), ${seeds}`;
  }

  /* The points that no other point beats with as few parameters or fewer, by parameters. */
  function front(points) {
    const found = [];
    const ordered = [...points].sort((a, b) => a.parameters - b.parameters || b.mean - a.mean);
    for (const point of ordered) {
      if (!found.length || point.mean > found[found.length - 1].mean) found.push(point);
    }
    return found;
  }

  /* Round numbers that divide an interval into about five parts. */
  function ticks(low, high) {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    const found = [];
    for (let index = Math.ceil(low / step); index * step <= high + 1e-12; index++) found.push(index * step);
    return found;
  }

  function draw(points, style, metric, say) {
    const chart = make("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group",
      "aria-label": `${metric} against trained parameters; the table below has the same numbers`,
    });
    if (!points.length) return chart;
    const counted = points.filter((point) => point.parameters > 0); // a logarithm needs them
    const exponents = counted.map((point) => Math.log10(point.parameters));
    let first = Math.min(...exponents), last = Math.max(...exponents);
    if (!counted.length) [first, last] = [0, 1];
    const margin = 0.05 * (last - first) || 0.5;
    [first, last] = [first - margin, last + margin];
    let low = Math.min(...points.map((point) => point.low));
    let high = Math.max(...points.map((point) => point.high));
    const room = 0.05 * (high - low) || 0.01;
    [low, high] = [low - room, high + room];
    const x = (value) => LEFT + ((Math.log10(value) - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const line = (x1, y1, x2, y2, kind) => make("line", { x1, y1, x2, y2, class: kind });
    const text = (where, content) => make("text", where, content);

    for (const tick of ticks(low, high)) {
      chart.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"));
      chart.append(text({ x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, share(tick)));
    }
    const wide = last - first > 2;
    for (let power = Math.floor(first); power <= last; power++) {
      for (const factor of wide ? [1] : [1, 2, 5]) {
        const value = factor * 10 ** power;
        if (Math.log10(value) < first || Math.log10(value) > last) continue;
        chart.append(line(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid"));
        chart.append(text({ x: x(value), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, count(value)));
      }
    }
    chart.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"));
    chart.append(line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "axis"));
    const middle = (LEFT + WIDTH - RIGHT) / 2;
    chart.append(text({ x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, "trained parameters"));
    const turned = `translate(14 ${(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)`;
    chart.append(text({ transform: turned, "text-anchor": "middle" }, metric));

    const best = front(points).filter((point) => point.parameters > 0);
    if (best.length) {
      const steps = best.map((point, index) => `${index ? "H" : "M"}${x(point.parameters)}${index ? "V" : " "}${y(point.mean)}`);
      chart.append(make("path", { d: `${steps.join("")}H${WIDTH - RIGHT}`, class: "front" }));
    }
    for (const point of points) {
      const { colour, shape } = style[point.family];
      const group = make("g", { tabindex: "0", role: "img", "aria-label": described(point), stroke: colour, fill: colour });
      group.append(make("title", {}, described(point)));
      if (point.parameters > 0) {
        const at = x(point.parameters);
        group.append(line(at, y(point.low), at, y(point.high), "bar"));
        for (const end of [point.low, point.high]) group.append(line(at - 4, y(end), at + 4, y(end), "bar"));
        group.append(make("path", { d: shape, transform: `translate(${at} ${y(point.mean)})` }));
      } else { // without parameters: a line at its height
        group.append(line(LEFT, y(point.mean), WIDTH - RIGHT, y(point.mean), "none"));
        group.append(make("text", { x: LEFT + 6, y: y(point.mean) - 5, stroke: "none" }, point.method));
      }
      group.addEventListener("focus", () => say(described(point)));
      group.addEventListener("mouseenter", () => say(described(point)));
      chart.append(group);
    }
    return chart;
  }

  function tabulate(points, metric) {
    const best = new Set(front(points));
    const heads = ["method", "family", "parameters", metric, "interval", "seeds", "on the front"];
    const rows = [...points].sort((a, b) => a.parameters - b.parameters).map((point) => {
      const interval = `${share(point.low)} to ${share(point.high)}`;
      const cells = [point.family, count(point.parameters), share(point.mean), interval, point.seeds, best.has(point) ? "yes" : ""];
      return make("tr", {}, make("th", { scope: "row" }, point.method), ...cells.map((cell) => make("td", {}, String(cell))));
    });
    const head = make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name)));
    return make("table", { class: "docutils" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function start(root, experiments) {
    const choice = make("select", { id: "compare-experiment" });
    for (const [name, experiment] of Object.entries(experiments)) {
      choice.append(make("option", { value: name }, experiment.title));
    }
    const boxes = make("fieldset", {});
    const picture = make("div", {}), status = make("p", { role: "status" }), table = make("div", { class: "table-wrapper" });
    const label = make("label", { for: "compare-experiment" }, "Experiment ");
    root.replaceChildren(make("p", {}, label, choice), boxes, picture, status, table);

    function show(style) {
      const experiment = experiments[choice.value];
      const chosen = new Set([...boxes.querySelectorAll("input:checked")].map((box) => box.value));
      const points = experiment.points.filter((point) => chosen.has(point.family));
      status.textContent = experiment.interval ? `Bars: ${experiment.interval}.` : "";
      picture.replaceChildren(draw(points, style, experiment.metric, (said) => { status.textContent = said; }));
      table.replaceChildren(tabulate(points, experiment.metric));
    }

    function choose() {
      const families = [...new Set(experiments[choice.value].points.map((point) => point.family))];
      const style = {};
      families.forEach((family, index) => {
        style[family] = { colour: COLOURS[index % COLOURS.length], shape: SHAPES[index % SHAPES.length] };
      });
      const shown = new Set(experiments[choice.value].shown);
      boxes.replaceChildren(make("legend", {}, "Families"), ...families.map((family) => {
        const box = make("input", { type: "checkbox", value: family, ...(shown.has(family) ? { checked: "" } : {}) });
        box.addEventListener("change", () => show(style));
        const { colour, shape } = style[family];
        const mark = make("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, make("path", { d: shape, fill: colour }));
        return make("label", {}, box, mark, family);
      }), ...["all", "none"].map((name) => {
        const button = make("button", { type: "button" }, name);
        button.addEventListener("click", () => {
          for (const box of boxes.querySelectorAll("input")) box.checked = name === "all";
          show(style);
        });
        return button;
      }));
      show(style);
    }

    choice.addEventListener("change", choose);
    choose();
  }

  const data = document.getElementById("compare-data");
  start(document.getElementById("compare"), JSON.parse(data.textContent));
})();
