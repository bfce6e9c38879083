// Elements of the page by their name, and new ones from text: nothing that comes from the server is ever read as markup.

/** The element of the page with an id. */
export const part = (id) => document.getElementById(id);

/** A new element: its attributes, and its children as elements or text. */
export function make(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const LONG = 40; // characters: more than fit beside their term

/** A term and its value, as rows of a definition list. */
export function row(term, ...value) {
  const long = value.length === 1 && String(value[0]).length > LONG;
  return make("div", { class: long ? "long" : null }, make("dt", {}, term), make("dd", {}, ...value));
}
