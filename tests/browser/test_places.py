"""The page where the server is elsewhere: behind a prefix, or gone."""

from __future__ import annotations

import re

from playwright.sync_api import Browser, Route, expect

from tests.browser.tools import settled
from tests.server.helpers import Running


def test_every_page_works_behind_a_proxy_that_strips_a_prefix(browser: Browser, server: Running) -> None:
    own = browser.new_context(base_url=server.url)
    tab = own.new_page()
    outside: list[str] = []

    def strip(route: Route) -> None:
        path = route.request.url.removeprefix(server.url)
        if path.startswith("/dd/"):
            route.fulfill(response=route.fetch(url=server.url + path.removeprefix("/dd")))
        else:
            outside.append(path)
            route.abort()

    tab.route(re.compile("^http"), strip)
    tab.goto("/dd/?label=ship&seed=7&steps=1")
    settled(tab)
    expect(tab.locator("#open")).to_have_attribute("href", re.compile("^images/dd1"))
    for name, heading in (("Models", "Models"), ("Metrics", "Metrics"), ("API", "Distilled Decoding API")):
        tab.get_by_role("link", name=name, exact=True).click()
        expect(tab.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    post = tab.locator("section", has=tab.get_by_text("/generate", exact=True))
    post.get_by_role("button", name="Send").click()
    expect(post.get_by_alt_text("The picture that came back")).to_have_count(1)
    tab.get_by_role("link", name="Playground").click()
    settled(tab)
    own.close()
    assert outside == []


def test_the_dot_tells_when_the_server_is_gone_and_back(browser: Browser, server: Running) -> None:
    page = browser.new_page(base_url=server.url)  # a request that fails is an error in its console
    page.goto("/?label=airplane&seed=7&steps=1")
    settled(page)
    dot, text = page.locator("#dot"), page.locator("#model-text")
    expect(dot).to_have_class("dot ready")
    page.route("**/readyz", lambda route: route.abort())
    expect(dot).to_have_class("dot gone")
    expect(text).to_have_text("the server does not answer")
    page.unroute("**/readyz")
    expect(dot).to_have_class("dot ready")
    expect(text).to_have_text("tiny, ready")
    page.close()
