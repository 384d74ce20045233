// The head: what was run, on what, and what a reader should know before trusting it.

function startHead() {
  $('run-name').append(name(run.name));
  $('run-status').append(visible(run.status.text));
  $('run-status').dataset.kind = run.status.kind;
  $('facts').append(...run.facts.map(([label, value]) => el('div', {}, el('dt', {}, label), el('dd', {}, breakable(value)))));
  $('versions').hidden = !run.versions.length;
  $('versions').lastElementChild.append(...run.versions.flatMap(([package_, version], i) => [i ? ' · ' : '', name(`${package_} ${version}`)]));
  $('notes').append(...run.notes.map(note));
  if (run.analysis?.kept) $('notes').append(note({ kind: 'info', text: `${run.analysis.kept}higher limit.`, command: 'sae-factory report RUN --max_mb 200' }));
  $('made').append(`Made by SAE Factory ${run.version}. This file is complete: it loads nothing, and sends nothing.`);
}

function note({ kind, text, command }) {
  return el('p', { class: `note ${kind}` }, el('strong', {}, kind === 'warning' ? 'Note' : 'Info'), ' ', visible(text), command ? el('code', {}, visible(command)) : null);
}
