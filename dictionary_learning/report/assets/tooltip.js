// One tooltip for all: elements that have something to tell are given a function that makes its content.

const told = new WeakMap();
let tipOf = null;
let pointer = null; // where it was last
let pointed = false; // the tooltip is the pointer's, not that of what has the focus

// What follows the pointer tells of the place that it is at: its content is made for how far across the picture that is.
function tells(node, content, { follow = false } = {}) {
  told.set(node, { content, follow });
  return node;
}

function showTip(node, by = null) {
  const { content, follow } = told.get(node);
  const whole = (node.ownerSVGElement || node).getBoundingClientRect();
  const at = follow && by ? { left: by.clientX, width: 0, top: by.clientY - 6, bottom: by.clientY + 14 } : null;
  const tip = $('tip');
  tipOf = node;
  pointed = Boolean(by);
  tip.replaceChildren(...content(at ? (at.left - whole.left) / (whole.width || 1) : 1));
  tip.hidden = false;
  const box = at || node.getClientRects()[0] || node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
  const above = box.top - height - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

function hideTip() {
  tipOf = null;
  $('tip').hidden = true;
}

// What it is about may be scrolled, out of sight too, or away from the pointer that it follows.
function followTip() {
  if (!tipOf) return;
  const { top, bottom } = tipOf.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight || !tipOf.isConnected) hideTip();
  else if (pointed && told.get(tipOf).follow && teller(document.elementFromPoint(pointer.clientX, pointer.clientY)) !== tipOf) hideTip();
  else showTip(tipOf, pointed ? pointer : null);
}

function teller(target) {
  for (let node = target; node && node !== document; node = node.parentNode) if (told.has(node)) return node;
  return null;
}

function startTooltips() {
  document.addEventListener('pointerover', (event) => {
    const rests = pointer && event.clientX === pointer.clientX && event.clientY === pointer.clientY;
    pointer = event;
    if (rests && tipOf && !pointed) return; // the page moved below it, as when the focus goes to what is out of sight
    const node = teller(event.target);
    if (node && node !== tipOf) showTip(node, event);
    else if (!node) hideTip();
  });
  // Not only while it is shown: scrolling hides it, and the pointer enters nothing when it moves on over the same picture.
  document.addEventListener('pointermove', (event) => {
    pointer = event;
    const node = teller(event.target);
    if (node && told.get(node).follow) showTip(node, event);
  });
  document.addEventListener('focusin', (event) => (told.has(event.target) ? showTip(event.target) : hideTip()));
  document.addEventListener('focusout', hideTip);
  document.addEventListener('scroll', followTip, { capture: true, passive: true });
}
