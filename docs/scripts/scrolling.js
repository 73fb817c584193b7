"use strict";
// Tables and code that are wider than the page scroll inside a box, which the arrow keys reach only if it has focus.
const reach = () => {
  let count = 0;
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, .md-typeset .shown")) {
    if (box.scrollWidth > box.clientWidth) {
      box.tabIndex = 0;
      if (box.tagName !== "CODE") {
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", `Part ${++count}, scrolls sideways`);
      }
    }
  }
};
// The theme puts tables into their boxes when the page is ready, and takes the focus from code again when sizes change.
const later = () => setTimeout(reach, 300);
window.addEventListener("load", later);
window.addEventListener("resize", later);
