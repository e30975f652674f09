for (const box of document.querySelectorAll("input[data-filter]")) {
  const rows = document.querySelectorAll("#" + box.dataset.filter + " tbody tr");
  const shown = document.getElementById(box.dataset.filter + "-shown");
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += row.hidden ? 0 : 1;
    }
    shown.textContent = count + " of " + rows.length;
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
