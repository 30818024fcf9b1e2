// Settings: while Precision LoRA is switched off, the options that depend on it are shown as idle.
(function () {
    const TOGGLE = "#setting_precision_lora_enabled input[type=checkbox]";
    const DEPENDENT = [
        "#setting_precision_lora_compute",
        "#setting_precision_lora_dense",
        "#setting_precision_lora_dora_norm",
        "#setting_precision_lora_text_encoders",
        "#setting_precision_lora_on_failure",
        "#setting_precision_lora_placement",
        "#setting_precision_lora_margin",
        "#setting_precision_lora_cache",
        "#setting_precision_lora_log_detail",
    ];

    function showState(toggle) {
        for (const selector of DEPENDENT) {
            const row = gradioApp().querySelector(selector);
            if (row) {
                row.classList.toggle("precision-lora-idle", !toggle.checked);
            }
        }
    }

    onUiLoaded(function () {
        const toggle = gradioApp().querySelector(TOGGLE);
        if (toggle) {
            toggle.addEventListener("change", () => showState(toggle));
            showState(toggle);
        }
    });
})();
