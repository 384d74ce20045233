// One tooltip for all: elements that have something to tell are given a function that makes its content.

const told = new WeakMap();
let tipOf = null;

function tells(node, content) {
  told.set(node, content);
  return node;
}

function showTip(node) {
  const content = told.get(node);
  if (!content) return;
  const tip = $('tip');
  tipOf = node;
  tip.replaceChildren(...content());
  tip.hidden = false;
  const box = node.getClientRects()[0] || node.getBoundingClientRect();
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

// What it is about may be scrolled, out of sight too.
function followTip() {
  if (!tipOf) return;
  const { top, bottom } = tipOf.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight || !tipOf.isConnected) hideTip();
  else showTip(tipOf);
}

function teller(target) {
  for (let node = target; node && node !== document; node = node.parentNode) if (told.has(node)) return node;
  return null;
}

function startTooltips() {
  document.addEventListener('pointerover', (event) => {
    const node = teller(event.target);
    if (node && node !== tipOf) showTip(node);
    else if (!node) hideTip();
  });
  document.addEventListener('focusin', (event) => (told.has(event.target) ? showTip(event.target) : hideTip()));
  document.addEventListener('focusout', hideTip);
  document.addEventListener('scroll', followTip, { capture: true, passive: true });
}
