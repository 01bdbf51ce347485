"""A SAML identity provider (pysaml2) and a broker before it (SATOSA) that speaks OpenID.

Takes its settings as JSON in its first argument, prints `port N` (the broker's);
serves until its standard input ends. The only user is logged in unasked.
"""

import json
import os
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from oic.oic.message import ProviderConfigurationResponse
from saml2 import BINDING_HTTP_POST, BINDING_HTTP_REDIRECT
from saml2.authn_context import PASSWORD
from saml2.config import IdPConfig, SPConfig
from saml2.metadata import create_metadata_string
from saml2.saml import NAMEID_FORMAT_PERSISTENT, NameID
from saml2.server import Server
from satosa.proxy_server import make_app
from satosa.satosa_config import SATOSAConfig

settings = json.loads(sys.argv[1])
host, folder = settings["host"], settings["folder"]
key, cert = os.path.join(folder, "key.pem"), os.path.join(folder, "cert.pem")
user = {"mail": settings["email"], "uid": "alice"}


# It insists on https, which tests do without on one machine.
ProviderConfigurationResponse.verify = lambda self, **_: True


class Page(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        asked = idp.parse_authn_request(query["SAMLRequest"], BINDING_HTTP_REDIRECT)
        args = idp.response_args(asked.message)
        args.pop("name_id_policy", None)
        args.pop("binding", None)
        name = NameID(format=NAMEID_FORMAT_PERSISTENT, text="opaque-alice")
        response = idp.create_authn_response(
            user, userid="alice", name_id=name, sign_assertion=True, sign_response=True,
            authn={"class_ref": PASSWORD, "authn_auth": base}, **args)
        http = idp.apply_binding(BINDING_HTTP_POST, str(response), args["destination"],
                                 query.get("RelayState", ""), response=True)
        body = http["data"].encode() if isinstance(http["data"], str) else b"".join(http["data"])
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Broker(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


# Both know each other's metadata before either answers: their ports come first.
pages = ThreadingHTTPServer((host, 0), Page)
broker = make_server(host, 0, None, Broker, Quiet)
base, front = f"http://{host}:{pages.server_port}", f"http://{host}:{broker.server_port}"
keys = {"key_file": key, "cert_file": cert}
sp = {
    "entityid": f"{front}/Saml2/proxy_saml2_backend.xml",
    "service": {"sp": {
        "allow_unsolicited": False, "want_response_signed": True, "want_assertions_signed": True,
        "endpoints": {"assertion_consumer_service": [(f"{front}/Saml2/acs/post", BINDING_HTTP_POST)]},
    }},
    **keys,
}
idp_settings = {
    "entityid": f"{base}/idp.xml",
    "service": {"idp": {
        "endpoints": {"single_sign_on_service": [(f"{base}/sso", BINDING_HTTP_REDIRECT)]},
        "policy": {"default": {"lifetime": {"minutes": 5}, "attribute_restrictions": None,
                               "name_form": "urn:oasis:names:tc:SAML:2.0:attrname-format:uri"}},
    }},
    **keys,
}


def described(config, name):
    path = os.path.join(folder, name)
    with open(path, "wb") as out:
        out.write(create_metadata_string(None, config=config))
    return {"local": [path]}


idp_metadata = described(IdPConfig().load(dict(idp_settings)), "idp.xml")
sp_metadata = described(SPConfig().load(dict(sp)), "sp.xml")
idp = Server(config=IdPConfig().load({**idp_settings, "metadata": sp_metadata}))
clients = os.path.join(folder, "clients.json")
with open(clients, "w") as out:
    json.dump({settings["client_id"]: {
        "client_id": settings["client_id"], "client_secret": settings["client_secret"],
        "redirect_uris": settings["redirect_uris"], "response_types": ["code"], "subject_type": "public",
        "token_endpoint_auth_method": "client_secret_basic"}}, out)
broker.set_app(make_app(SATOSAConfig({
    "BASE": front,
    "COOKIE_STATE_NAME": "satosa", "COOKIE_SECURE": False, "COOKIE_SAMESITE": "Lax",
    "STATE_ENCRYPTION_KEY": "a key of tests only",
    "INTERNAL_ATTRIBUTES": {"attributes": {
        "mail": {"openid": ["email"], "saml": ["mail"]},
        "uid": {"openid": ["nickname"], "saml": ["uid"]},
    }},
    "LOGGING": {"version": 1, "root": {"level": "WARNING"}},
    "BACKEND_MODULES": [{
        "module": "satosa.backends.saml2.SAMLBackend", "name": "Saml2",
        "config": {"sp_config": {**sp, "metadata": idp_metadata}},
    }],
    "FRONTEND_MODULES": [{
        "module": "satosa.frontends.openid_connect.OpenIDConnectFrontend", "name": "OIDC",
        "config": {
            "signing_key_path": key, "signing_key_id": "broker", "client_db_path": clients,
            "provider": {
                "response_types_supported": ["code"], "subject_types_supported": ["public"],
                "scopes_supported": ["openid", "email"], "client_registration_supported": False,
                "extra_id_token_claims": {settings["client_id"]: ["email"]},
            },
        },
    }],
})))
threading.Thread(target=pages.serve_forever, daemon=True).start()
threading.Thread(target=broker.serve_forever, daemon=True).start()
print(f"port {broker.server_port}", flush=True)
sys.stdin.read()
