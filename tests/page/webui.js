// As much of the WebUI's own JavaScript as the extension's scripts, and the buttons of this page, call.
const uiLoadedCallbacks = [];
let executedOnLoaded = false;

function gradioApp() {
    return document;
}

function onUiLoaded(callback) {
    uiLoadedCallbacks.push(callback);
}

function localGet(key) {
    return localStorage.getItem(key);
}

// "Skip" is shown while a generation runs.
function showSkip(tab, shown) {
    gradioApp().getElementById(`${tab}_skip`).style.display = shown ? "block" : "none";
}

function submit(tab, values) {
    const task = `task(${Math.random().toString(36).slice(2)})`;
    localStorage.setItem(`${tab}_task_id`, task);
    showSkip(tab, true);
    return [task, ...values.slice(1)];
}

function finished(tab) {
    showSkip(tab, false);
    localStorage.removeItem(`${tab}_task_id`);
    answered();
}

// How often the server has answered a button, for the tests to see.
function answered() {
    const page = document.documentElement;
    page.dataset.answers = 1 + Number(page.dataset.answers || 0);
}

// The page in the language of its address: every text that has a translation, as soon as it is there.
const language = new URLSearchParams(location.search).get("language");

function translate(node) {
    const texts = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    while (node) {
        const translation = node.nodeType === Node.TEXT_NODE && translations[language][node.textContent.trim()];
        if (translation) {
            node.textContent = translation;
        }
        node = texts.nextNode();
    }
}

new MutationObserver((mutations) => {
    if (language) {
        mutations.forEach((mutation) => mutation.addedNodes.forEach(translate));
    }
    const there = ["txt2img_generate", "img2img_generate", "settings_submit"];
    if (!executedOnLoaded && there.every((id) => gradioApp().getElementById(id))) {
        executedOnLoaded = true;
        uiLoadedCallbacks.forEach((callback) => callback());
        document.documentElement.dataset.uiLoaded = "true";
    }
}).observe(document, {childList: true, subtree: true});
