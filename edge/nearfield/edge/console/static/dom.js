// Building the page. Whatever comes from elsewhere becomes text, never markup: there is no other
// way to add anything here, and the page's policy (trusted types) refuses the others.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings among them become text. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) set(element, name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Set an attribute, or remove it (null, false); nothing is touched that is right already. */
export function set(element, name, value) {
  if (value === null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set an element's text; nothing is touched that is right already. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A name that others chose: its direction must not change that of its surroundings. */
export function name(text, attributes = {}) {
  return h("bdi", { title: text.length > 20 ? text : null, ...attributes }, text);
}

export const get = (id) => document.getElementById(id);

/**
 * Keep a parent's children in step with data: made once for each key, updated in place, in order.
 * Elements that stay are not touched, so focus and selection survive. What comes up to `after` is
 * not ours.
 */
export function keep(parent, items, keyOf, make, update, after = null) {
  const known = (parent.kept ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  let next = after === null ? parent.firstElementChild : after.nextElementSibling;
  for (const item of items) {
    const key = keyOf(item);
    let element = known.get(key);
    if (element === undefined) {
      element = make(item);
      known.set(key, element);
    }
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update(element, item);
  }
}

const SHAPES = {
  up: ["circle", { cx: 7, cy: 7, r: 4.5 }],
  ejected: ["path", { d: "M7 1.6 13 12.4H1Z" }],
  down: ["path", { d: "M2.5 2.5 11.5 11.5M11.5 2.5 2.5 11.5", class: "line" }],
  unknown: ["circle", { cx: 7, cy: 7, r: 4, class: "line" }],
  draining: ["path", { d: "M7 2.5A4.5 4.5 0 0 0 7 11.5ZM7 2.5A4.5 4.5 0 0 1 7 11.5", class: "half" }],
  scaling: ["path", { d: "M3 9 7 5 11 9", class: "line" }],
};

/** Health as a shape and a colour: 14 × 14, its middle at 7, 7. */
export function shape(health) {
  const [tag, attributes] = SHAPES[health] ?? SHAPES.unknown;
  return s(tag, attributes);
}

export function glyph(health) {
  return s("svg", { viewBox: "0 0 14 14", class: `glyph is-${health}`, "aria-hidden": "true" }, shape(health));
}

export function changeGlyph(element, health) {
  if (element.dataset.health === health) return;
  element.dataset.health = health;
  element.replaceChildren(glyph(health));
}

/** A small line of the last values. Its words are beside it. */
export function sparkline(values, most, width = 84, height = 22) {
  const svg = s("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, s("path"));
  updateSparkline(svg, values, most, width, height);
  return svg;
}

export function updateSparkline(svg, values, most, width = 84, height = 22) {
  const top = Math.max(1, ...values);
  const step = width / Math.max(1, most - 1);
  const left = width - step * (values.length - 1);
  const points = values.map((value, i) => {
    const y = height - 2 - (value / top) * (height - 4);
    return `${(left + i * step).toFixed(1)} ${y.toFixed(1)}`;
  });
  set(svg.firstElementChild, "d", points.length > 1 ? `M${points.join("L")}` : null);
}
