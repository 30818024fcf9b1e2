// Under the accordion: what the generation that this page has asked for has applied, once it has ended.
(function () {
    const tasks = {};

    window.precisionLoraTask = (tab) => tasks[tab] || "";

    // "Skip" is there from the start of a generation to its end, however it ends.
    function follow(tab) {
        const skip = gradioApp().getElementById(`${tab}_skip`);
        const refresh = gradioApp().getElementById(`precision_lora_${tab}_refresh`);
        if (!skip || !refresh) {
            return;
        }
        let running = false;
        new MutationObserver(() => {
            const shown = skip.style.display === "block";
            if (shown) {
                tasks[tab] = localGet(`${tab}_task_id`) || tasks[tab];
            } else if (running) {
                refresh.click();
            }
            running = shown;
        }).observe(skip, {attributes: true, attributeFilter: ["style"]});
    }

    onUiLoaded(() => ["txt2img", "img2img"].forEach(follow));
})();
