/* Says why a file was not taken: before it is sent where it is too large, after that in the server's words. */
(() => {
  const most = MOST_BYTES;
  const say = text => {
    const place = document.getElementById("refused");
    if (place) { place.textContent = text; place.hidden = !text; }
  };
  const tooLarge = file => file && file.size > most;
  const check = (event, files) => {
    if (!files || !files.length) return;
    const large = [...files].find(tooLarge);
    say(large ? `The file has ${(large.size / 1e6).toFixed(1)} MB; ${most / 1e6} MB is the most.` : "");
    if (!large) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    if (event.target.type === "file") event.target.value = "";
  };
  document.addEventListener("change", event => check(event, event.target.files), true);
  document.addEventListener("drop", event => check(event, event.dataTransfer && event.dataTransfer.files), true);
  const fetched = window.fetch;
  window.fetch = async (address, options) => {
    const upload = /\/gradio_api\/upload(\?|$)/.test(String(address.url || address));
    try {
      const answer = await fetched(address, options);
      if (upload && !answer.ok) say(await answer.clone().text());
      return answer;
    } catch (error) {
      if (upload) say("The file could not be sent. Please try again.");
      throw error;
    }
  };
})();
