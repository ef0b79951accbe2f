"""`serverless.yml`: what it becomes is valid CloudFormation, its role may do what it must, it has no secrets."""

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from examples.fastapi_app import lambda_recover

from metered_billing import MeteredBillingMiddleware
from metered_billing.settings import Settings

FILE = Path(__file__).parents[2] / "examples" / "fastapi_app" / "serverless.yml"

KNOWN = {
    "sls:stage": "prod",
    "opt:region": "eu-central-1",
    "opt:stage": "prod",
    "aws:region": "eu-central-1",
    "aws:accountId": "123456789012",
}


def resolved(text: str) -> dict[str, Any]:
    """The file, with its variables filled in as the framework fills them in."""
    parameters = yaml.safe_load(text)["params"]["default"]

    def fill(match: re.Match[str]) -> str:
        name = match[1].partition(",")[0].strip()
        return str(parameters[name.removeprefix("param:")] if name.startswith("param:") else KNOWN[name])

    return yaml.safe_load(re.sub(r"\$\{([^}]*)\}", fill, text))  # type: ignore[no-any-return]


def cloudformation(service: dict[str, Any]) -> dict[str, Any]:
    """What the framework makes of it, as its documentation says: role, functions, log groups, HTTP API and rule."""
    provider = service["provider"]
    name = f"{service['service']}-{provider['stage']}"
    logs = [f"arn:aws:logs:eu-central-1:123456789012:log-group:/aws/lambda/{name}*:*"]
    resources: dict[str, Any] = {
        "Role": {
            "Type": "AWS::IAM::Role",
            "Properties": {
                "AssumeRolePolicyDocument": policy(
                    {
                        "Effect": "Allow",
                        "Principal": {"Service": ["lambda.amazonaws.com"]},
                        "Action": ["sts:AssumeRole"],
                    }
                ),
                "Policies": [
                    {
                        "PolicyName": f"{name}-lambda",
                        "PolicyDocument": policy(
                            {
                                "Effect": "Allow",
                                "Action": ["logs:CreateLogStream", "logs:PutLogEvents"],
                                "Resource": logs,
                            },
                            *provider["iam"]["role"]["statements"],
                        ),
                    }
                ],
                "ManagedPolicyArns": ["arn:aws:iam::aws:policy/service-role/AWSLambdaVPCAccessExecutionRole"],
            },
        }
    }
    for key, function in service["functions"].items():
        called = f"{name}-{key}"
        resources[f"{key.title()}Logs"] = {
            "Type": "AWS::Logs::LogGroup",
            "Properties": {"LogGroupName": f"/aws/lambda/{called}", "RetentionInDays": provider["logRetentionInDays"]},
        }
        resources[f"{key.title()}Function"] = {
            "Type": "AWS::Lambda::Function",
            "Properties": {
                "FunctionName": called,
                "Code": {"S3Bucket": "deployments", "S3Key": service["package"]["artifact"]},
                "Handler": function["handler"],
                "Runtime": provider["runtime"],
                "Architectures": [provider["architecture"]],
                "MemorySize": provider["memorySize"],
                "Timeout": function.get("timeout", provider["timeout"]),
                "ReservedConcurrentExecutions": function["reservedConcurrency"],
                "Environment": {"Variables": provider["environment"]},
                "VpcConfig": {
                    "SubnetIds": provider["vpc"]["subnetIds"],
                    "SecurityGroupIds": provider["vpc"]["securityGroupIds"],
                },
                "Role": {"Fn::GetAtt": ["Role", "Arn"]},
            },
        }
        resources[f"{key.title()}Retries"] = {
            "Type": "AWS::Lambda::EventInvokeConfig",
            "Properties": {
                "FunctionName": {"Ref": f"{key.title()}Function"},
                "Qualifier": "$LATEST",
                "MaximumRetryAttempts": function["maximumRetryAttempts"],
            },
        }
        for event in function["events"]:
            resources |= _caller(key.title(), event)
    return {"AWSTemplateFormatVersion": "2010-09-09", "Resources": resources}


def _caller(key: str, event: dict[str, Any]) -> dict[str, Any]:
    function = {"Fn::GetAtt": [f"{key}Function", "Arn"]}
    if "schedule" in event:
        rule = {"ScheduleExpression": event["schedule"], "Targets": [{"Id": key, "Arn": function}], "State": "ENABLED"}
        return {"Rule": {"Type": "AWS::Events::Rule", "Properties": rule}} | _permission(key, "events.amazonaws.com")
    assert event == {"httpApi": "*"}
    integration = {
        "ApiId": {"Ref": "Api"},
        "IntegrationType": "AWS_PROXY",
        "IntegrationUri": function,
        "PayloadFormatVersion": "2.0",
        "TimeoutInMillis": 30_000,
    }
    route = {"ApiId": {"Ref": "Api"}, "RouteKey": "$default", "Target": {"Fn::Sub": "integrations/${Integration}"}}
    return {
        "Api": {"Type": "AWS::ApiGatewayV2::Api", "Properties": {"Name": "cutouts", "ProtocolType": "HTTP"}},
        "Integration": {"Type": "AWS::ApiGatewayV2::Integration", "Properties": integration},
        "Route": {"Type": "AWS::ApiGatewayV2::Route", "Properties": route},
    } | _permission(key, "apigateway.amazonaws.com")


def _permission(key: str, principal: str) -> dict[str, Any]:
    allowed = {
        "FunctionName": {"Fn::GetAtt": [f"{key}Function", "Arn"]},
        "Action": "lambda:InvokeFunction",
        "Principal": principal,
    }
    return {f"{key}Permission": {"Type": "AWS::Lambda::Permission", "Properties": allowed}}


def policy(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def findings(policy: dict[str, Any]) -> list[str]:
    """What parliament finds in a policy."""
    with warnings.catch_warnings():
        # It has odd escapes in its source, and leaves files open.
        warnings.simplefilter("ignore")
        import parliament

        return [str(finding) for finding in parliament.analyze_policy_string(json.dumps(policy)).findings]


def lint(template: dict[str, Any]) -> list[str]:
    """What cfn-lint finds in a template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cfnlint.api import ManualArgs  # type: ignore[import-untyped]
        from cfnlint.api import lint as check

        matches = check(json.dumps(template), config=ManualArgs(regions=["eu-central-1"]))
    return [f"{match.rule.id} {match.message}" for match in matches]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return resolved(FILE.read_text())


def test_role_may_read_its_own_settings_and_nothing_else(service: dict[str, Any]) -> None:
    """Each action fits its resource; nothing stands for all; the key is for what SSM asks on its behalf."""
    statements = service["provider"]["iam"]["role"]["statements"]
    assert findings(policy(*statements)) == []
    prefix = service["provider"]["environment"]["METERED_BILLING_SSM_PREFIX"]
    ssm = f"arn:aws:ssm:eu-central-1:123456789012:parameter{prefix}"
    assert {statement["Action"]: statement["Resource"] for statement in statements} == {
        "ssm:GetParametersByPath": [ssm, f"{ssm}/*"],
        "kms:Decrypt": "arn:aws:kms:eu-central-1:123456789012:key/11111111-2222-3333-4444-555555555555",
    }
    [decrypt] = [statement for statement in statements if statement["Action"] == "kms:Decrypt"]
    assert decrypt["Condition"] == {"StringEquals": {"kms:ViaService": "ssm.eu-central-1.amazonaws.com"}}


def test_misspelt_action_and_wrong_resource_are_found(service: dict[str, Any]) -> None:
    """The check can fail."""
    read, decrypt = service["provider"]["iam"]["role"]["statements"]
    assert any("UNKNOWN_ACTION" in found for found in findings(policy(read | {"Action": "ssm:GetParameterByPaths"})))
    assert any("RESOURCE_MISMATCH" in found for found in findings(policy(decrypt | {"Resource": read["Resource"]})))


@pytest.mark.slow
def test_what_it_becomes_is_valid_cloudformation(service: dict[str, Any]) -> None:
    """cfn-lint finds nothing; and it does find what is wrong."""
    template = cloudformation(service)
    assert lint(template) == []
    template["Resources"]["AppFunction"]["Properties"]["MemorySize"] = 64
    template["Resources"]["Role"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"][0]["Effect"] = "Alow"
    found = " ".join(lint(template))
    assert "64 is less than the minimum of 128" in found
    assert "'Alow' is not one of" in found


def test_environment_names_settings_and_no_secrets(service: dict[str, Any]) -> None:
    """The token, and the journal's password with its URL, are in SSM alone."""
    environment = service["provider"]["environment"]
    names = {name.removeprefix("METERED_BILLING_").lower() for name in environment}
    ours = {name for name in names if not name.startswith("demo_")}
    assert ours - {"ssm_prefix"} <= set(Settings.model_fields)
    assert not ours & {"token", "journal", "credits"}
    assert environment["METERED_BILLING_SETTLE"] == "inline"


def test_times_fit_into_each_other(service: dict[str, Any]) -> None:
    """Settling ends before the function does, the function before the gateway, recovery before its next minute."""
    functions, provider = service["functions"], service["provider"]
    settles_s = inspect.signature(MeteredBillingMiddleware).parameters["settle_timeout_s"].default
    assert settles_s * 5 < provider["timeout"] < 30
    assert lambda_recover.SPARE_S < functions["recover"]["timeout"] <= 60
    for function in functions.values():
        module, _, handler = function["handler"].rpartition(".")
        file = FILE.parents[2] / (module.replace(".", "/") + ".py")
        assert re.search(rf"^(def )?{handler}\b", file.read_text(), flags=re.M)
