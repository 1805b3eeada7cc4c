// /api/docs: Swagger UI on the service's own description.
import { connect } from "./session.js";

const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null, // else it would send the description to a validator elsewhere
});

const bearer = () =>
  ui.specSelectors.specJson().getIn(["components", "securitySchemes"])?.findKey((scheme) => scheme.get("scheme") === "bearer");

connect(
  (token) => ui.preauthorizeApiKey(bearer(), token),
  () => ui.authActions.logout([bearer()]),
);
